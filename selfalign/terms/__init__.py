"""Terms: the losses whose weighted sum is minimised (Eq. 4, and beyond)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from selfalign.parts import Part

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Generator, Tensor, nn

    from selfalign.config import ResolvedConfig, RunConfig
    from selfalign.network import Backbone, Tap
    from selfalign.objective import Pass


@dataclass(frozen=True)
class Term(Part):
    """One loss, with a weight that may change over the run."""

    kind: ClassVar[str] = "term"

    weight: float = 1.0
    """Weight of this term in the total loss."""
    decay: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    """What becomes of the weight: it stays, falls to 0 along a line or a half cosine, or keeps falling to
    a tenth within decay_steps."""
    decay_start: int = 0
    """Optimizer step from which on the weight falls."""
    decay_steps: int = 100_000
    """Steps in which the weight falls to 0 (linear, cosine), or to a tenth (exponential)."""
    decay_every: int = 1
    """Steps between two changes of a falling weight; those of an epoch let it fall by epochs."""
    start_step: int = 0
    """Optimizer step from which on the term is computed."""
    stop_step: int = 0
    """Optimizer step from which on the term is no longer computed; 0: never."""

    def check(self) -> None:
        """Limits of the weight and its schedule."""
        self.require_number("weight", 0, math.inf, "a number from 0")
        self.require_number("decay_start", 0, math.inf, "a number from 0")
        self.require_number("decay_steps", 1, math.inf, "a number from 1")
        self.require_number("decay_every", 1, math.inf, "a number from 1")
        self.require_number("start_step", 0, math.inf, "a number from 0")
        self.require_number("stop_step", 0, math.inf, "a step from 1, or 0 (never)")
        self.require(
            self.decay == "constant" or self.stop_step == 0 or self.stop_step > self.decay_start,
            "stop_step",
            f"allowed is a step after decay_start, which is {self.decay_start}, or 0 (never)",
        )
        self.require(
            self.stop_step == 0 or self.stop_step > self.start_step,
            "stop_step",
            f"allowed is a step after start_step, which is {self.start_step}, or 0 (never)",
        )

    def weight_at(self, step: int) -> float:
        """The weight of optimizer step `step`, counted from 0."""
        reached = step // self.decay_every * self.decay_every
        fallen = max(0, reached - self.decay_start) / self.decay_steps
        if self.decay == "linear":
            return self.weight * max(0.0, 1 - fallen)
        if self.decay == "cosine":
            return self.weight * 0.5 * (1 + math.cos(math.pi * min(1.0, fallen)))
        if self.decay == "exponential":
            return float(self.weight * 10**-fallen)
        return self.weight

    def stopped(self, step: int) -> bool:
        """Whether the term is not computed at optimizer step `step`: not yet, or no longer."""
        return step < self.start_step or 0 < self.stop_step <= step

    def is_used(self, config: RunConfig) -> bool:
        """Whether the term is one of the config's."""
        return self.name in config.objective.terms

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """Whose features the term looks at, besides those of its heads. None by default."""
        return ()

    def target_names(self) -> tuple[str, ...]:
        """The targets that the term compares with. None by default."""
        return ()

    def head_names(self, config: ResolvedConfig) -> tuple[str, ...]:
        """Names of the heads that `heads` makes. None by default."""
        return ()

    def heads(
        self, config: ResolvedConfig, backbone: Backbone
    ) -> Mapping[str, tuple[Tap, nn.Module]]:
        """The term's heads by name, each with the tap it hangs on. None by default."""
        return {}

    def draw(
        self, config: RunConfig, shape: tuple[int, ...], generator: Generator
    ) -> Mapping[str, Tensor]:
        """Random numbers that the term needs in a step, by name (`Draw.more`). None by default."""
        return {}

    @abstractmethod
    def __call__(self, forward: Pass) -> Float[Tensor, ""] | Float[Tensor, B]:
        """The loss of a batch, or of each sample.

        Args:
            forward: the batch, its views and draw, the student's output, and the targets' features.
        """

"""Terms: the losses whose weighted sum is minimised (Eq. 4, and beyond)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from selfalign.parts import Part

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Generator, Tensor, nn

    from selfalign.config import ResolvedConfig, RunConfig
    from selfalign.network import Backbone, Tap
    from selfalign.objective import Pass
    from selfalign.tokens import TokenGroups


def over_groups(
    loss: Callable[..., Tensor],
    groups: TokenGroups,
    weights: tuple[float, ...],
    *features: Float[Tensor, "B N D"],
    counted: Float[Tensor, "B N"] | None = None,
) -> Tensor:
    """Σ w_k·n_k·loss(group k) / Σ w_k·n_k: a mean over tokens that weighs each by its group.

    Args:
        loss: a mean over the tokens of the features that it is called with.
        groups: that the features are in.
        weights: of the groups; those of weight 0 are not scored. None at all: every token counts the same.
        features: what is compared, in group order.
        counted: of samples of unequal lengths, how much of each token counts; None: all that are there.
    """
    if groups.present is not None:
        there = groups.present if counted is None else counted
        return _over_present(loss, groups, groups.present, there, weights, *features)
    if not weights:
        return loss(*features)
    shares = [w * n for w, n in zip(weights, groups.sizes, strict=False)]
    scored = [(share, part) for share, part in zip(shares, groups.slices, strict=True) if share]
    parts = [share * loss(*(held[:, part] for held in features)) for share, part in scored]
    return sum(parts[1:], start=parts[0]) / sum(share for share, _ in scored)


def _over_present(
    loss: Callable[..., Tensor],
    groups: TokenGroups,
    present: Tensor,
    counted: Tensor,
    weights: tuple[float, ...],
    *features: Tensor,
) -> Tensor:
    """The same over the tokens that are there: where none is, nothing differs and nothing counts."""
    import torch

    present = present[:, : features[0].shape[1]]
    held = [torch.where(present[..., None], values, 1.0) for values in features]
    weighed = zip(weights or [1.0] * len(groups.sizes), groups.slices, strict=False)
    total = count = present.new_zeros((), dtype=held[0].dtype)
    for weight, part in weighed:
        found = loss(*(values[:, part] for values in held))
        there = counted[:, part].sum(dim=1).to(found.dtype)
        total = total + weight * (part.stop - part.start) * found
        count = count + weight * (there if found.ndim else there.mean())
    return total / count.clamp(min=1e-6)


def over_values(
    groups: TokenGroups,
    weights: tuple[float, ...],
    there: Bool[Tensor, "B N P"] | None,
    velocity: Float[Tensor, "B N P"],
    target: Float[Tensor, "B N P"],
) -> Float[Tensor, B]:
    """`velocity_error` over groups, per sample: of a token that ends early over the values that it has.

    Args:
        groups, weights: as for `over_groups`.
        there: which values are there; None: all.
        velocity, target: in group order.
    """
    import torch

    from selfalign.flow import velocity_error

    if there is None:
        return over_groups(velocity_error, groups, weights, velocity, target)
    velocity = torch.where(there, velocity, target)
    counted = there.to(velocity.dtype).mean(dim=2)
    return over_groups(velocity_error, groups, weights, velocity, target, counted=counted)


def check_group_weights(term: Term, weights: tuple[float, ...], config: Any) -> None:
    """Refuse weights of groups that are not there, and a sum of nothing."""
    term.require(
        all(weight >= 0 and math.isfinite(weight) for weight in weights),
        "group_weights",
        "allowed are numbers from 0, one per group",
    )
    for views in config.curriculum.all_views(config) if weights else ():
        groups = len(views.mask_ratios)
        seen = groups if views.skipped_blocks else groups - views.hidden_groups
        term.require(
            len(weights) == groups and any(weights[:seen]),
            "group_weights",
            f"allowed is one per group of views.mask_ratios, {groups}, and not 0 for all that are seen",
        )


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

    def require_pairs(self, config: RunConfig) -> None:
        """Refuse steps that see one image at once: there is no other to compare it with."""
        training = config.training
        images = training.batch_size // training.gradient_accumulation
        needed = f"terms.{self.name} needs 2 images at once, and has {images}"
        training.require(images >= 2, "batch_size", needed)

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

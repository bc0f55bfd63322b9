"""Targets: what the student's features are aligned with (Eq. 3 and 7)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfalign.parts import Part

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig
    from selfalign.network import Tap
    from selfalign.objective import Pass


@dataclass(frozen=True)
class Target(Part):
    """Features to compare with, without gradient, token by token in the student's order."""

    kind: ClassVar[str] = "target"

    def build(self, config: ResolvedConfig) -> Target:
        """What gives the features in a run: this part, unless it has networks to load first."""
        return self

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """Features of the student's own pass that the target is made of. None by default."""
        return ()

    def teacher_taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """Features of the EMA teacher that the target is made of. None by default."""
        return ()

    @abstractmethod
    def features(self, forward: Pass) -> Float[Tensor, "B N Z"]:
        """The target's features of a batch.

        Args:
            forward: the batch, its views and draw, the student's output and the EMA teacher.
        """

"""The generation loss of flow matching (Eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.terms import Term

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import RunConfig
    from selfalign.objective import Pass


@register("denoising")
@dataclass(frozen=True)
class Denoising(Term):
    """Squared error of the velocity, L_gen. Every objective has it."""

    def is_used(self, config: RunConfig) -> bool:
        """Always."""
        return True

    def __call__(self, forward: Pass) -> Float[Tensor, B]:
        """The mean over tokens and channels, per sample."""
        from selfalign.flow import velocity_error

        return velocity_error(forward.output.velocity, forward.views.target)

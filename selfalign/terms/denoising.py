"""The generation loss of flow matching (Eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.parts import register
from selfalign.terms import Term, check_group_weights, over_values

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import RunConfig
    from selfalign.objective import Pass


@register("denoising")
@dataclass(frozen=True)
class Denoising(Term):
    """Squared error of the velocity, L_gen. Every objective has it."""

    group_weights: tuple[float, ...] = ()
    """Weight of a token in each group; 0: the group is noised and seen but not scored. Left out: all the
    same."""

    def check_in(self, config: Any) -> None:
        """A weight per group."""
        check_group_weights(self, self.group_weights, config)

    def is_used(self, config: RunConfig) -> bool:
        """Always."""
        return True

    def __call__(self, forward: Pass) -> Float[Tensor, B]:
        """The mean over tokens and channels, per sample."""
        views, velocity = forward.views, forward.output.velocity
        return over_values(views.groups, self.group_weights, views.there, velocity, views.target)

"""An independent timestep per group: with two groups, dual-timestep scheduling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.schedules import Schedule

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.schedules import Distribution


@register("independent", aliases=("dual",))
@dataclass(frozen=True)
class Independent(Schedule):
    """Each group draws its own timestep from p(t) (Eq. 5 and 6; Self-Flow)."""

    def timesteps(
        self, earlier: Sequence[Float[Tensor, B]], distribution: Distribution
    ) -> Float[Tensor, B]:
        """A fresh draw."""
        return distribution()

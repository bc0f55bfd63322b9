"""One timestep per sample."""

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


@register("single")
@dataclass(frozen=True)
class Single(Schedule):
    """All groups share one timestep, as in flow matching without groups."""

    one_per_sample = True

    def timesteps(
        self, earlier: Sequence[Float[Tensor, B]], distribution: Distribution
    ) -> Float[Tensor, B]:
        """The first group's for all."""
        return earlier[0] if earlier else distribution()

"""Groups by how hard tokens are for the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.partitions.ranked import Ranked
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.partitions import Ungrouped


@register("difficulty")
@dataclass(frozen=True)
class Difficulty(Ranked):
    """Hard tokens are apart from easy ones, by the EMA teacher's denoising error of the whole sample."""

    timestep: float = 0.5
    """At which the teacher sees the sample."""

    def check(self) -> None:
        """Limits of the numbers."""
        super().check()
        self.require_number("timestep", 0, 1, "a timestep from 0 (clean) to 1 (noise)")

    def scores(self, batch: Ungrouped) -> Float[Tensor, "B N"] | None:
        """The squared velocity error, on the step's own noise."""
        return batch.teacher_errors(self.timestep)

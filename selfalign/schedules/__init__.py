"""Timestep schedules: which timestep each token group gets (Eq. 5 and 6)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfalign.parts import Part

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.flow import TimestepDistribution

    Distribution = TimestepDistribution
    """p(t) for the samples of a batch: called, it draws a timestep for each."""


@dataclass(frozen=True)
class Schedule(Part):
    """Gives the groups of a sample their timesteps, one group after the other."""

    kind: ClassVar[str] = "schedule"

    one_per_sample: ClassVar[bool] = False
    """Whether all groups of a sample always share one timestep."""

    @abstractmethod
    def timesteps(
        self, earlier: Sequence[Float[Tensor, B]], distribution: Distribution
    ) -> Float[Tensor, B]:
        """The timesteps of the next group.

        Args:
            earlier: those of the groups before it.
            distribution: draws from p(t), anew at every call; its quantiles are there too.
        """

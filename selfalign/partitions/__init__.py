"""Partitions: how each sample's tokens are split into groups (Eq. 5 and 6, and beyond)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfalign.parts import Part

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Generator, Tensor

    from selfalign.tokens import TokenGrid


@dataclass(frozen=True)
class Partition(Part):
    """Sorts tokens; the groups' sizes, which all samples share, come from `views.mask_ratios`.

    Every token's timestep is distributed as p(t) under any partition, since a group's timestep does not
    depend on which tokens it holds.
    """

    kind: ClassVar[str] = "partition"

    @abstractmethod
    def order(
        self,
        grid: TokenGrid,
        sizes: tuple[int, ...],
        batch: int,
        generator: Generator,
        x0: Float[Tensor, "B C *sides"] | None,
    ) -> Int[Tensor, "B N"]:
        """A permutation of each sample's tokens; group k is its k-th slice, of `sizes[k]` tokens.

        Args:
            grid: where the tokens lie.
            sizes: tokens of each group.
            batch: samples B.
            generator: the step's; the order is on its device and nothing else draws.
            x0: the clean samples, for partitions by content; None where only shapes are known.
        """

"""Groups that are stripes of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.partitions import Partition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from selfalign.partitions import Ungrouped


@register("stripes")
@dataclass(frozen=True)
class Stripes(Partition):
    """The grid is cut into stripes across one axis, and groups take whole stripes at random.

    Where a group's size is no multiple of a stripe, the last stripe it takes is shared with the next group.
    """

    axis: int = 0
    """Axis along which the stripes follow each other: 0 stacks rows of an image, 1 columns."""
    width: int = 1
    """Tokens of a stripe along that axis."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("axis", 0, 2, "0 (rows; frames of a video), 1 or 2")
        self.require_number("width", 1, 1e6, "a number from 1")

    def order(self, batch: Ungrouped) -> Int[Tensor, "B N"]:
        """Tokens by their stripe's random rank, and within a stripe in image order."""
        grid = batch.grid
        axis = min(self.axis, len(grid.shape) - 1)
        stripe = grid.coordinates(batch.device)[:, axis] // self.width
        count = -(-grid.shape[axis] // self.width)
        rank = batch.uniform(count).argsort(dim=1)
        return rank.argsort(dim=1)[:, stripe].argsort(dim=1, stable=True)

"""Groups that are stripes of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

    Where a group's size is no multiple of a stripe, the last stripe it takes is shared with the next group,
    each with tokens of it at random: none is always in the same group.
    """

    axis: int = 0
    """Axis along which the stripes follow each other: 0 stacks rows of an image, 1 columns."""
    width: int = 1
    """Tokens of a stripe along that axis."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("axis", 0, 2, "0 (rows; frames of a video), 1 or 2")
        self.require_number("width", 1, 1e6, "a number from 1")

    def check_in(self, config: Any) -> None:
        """The axis must be there, and two stripes along it."""
        grid = getattr(config.model, "grid", None)
        if grid is None:  # the data's shapes are not known yet
            return
        axes = len(grid.shape)
        self.require(self.axis < axes, "axis", f"the data has {axes}, counted from 0")
        tokens = grid.shape[self.axis]
        self.require(
            self.width < tokens, "width", f"of {tokens} tokens that is one stripe; allowed is less"
        )

    def order(self, batch: Ungrouped) -> Int[Tensor, "B N"]:
        """Tokens by their stripe's random rank; within a stripe in image order unless one is shared."""
        grid = batch.grid
        axis = min(self.axis, len(grid.shape) - 1)
        stripe = grid.coordinates(batch.device)[:, axis] // self.width
        count = -(-grid.shape[axis] // self.width)
        rank = batch.uniform(count).argsort(dim=1)
        place = rank.argsort(dim=1)[:, stripe]
        tokens = grid.num_tokens // grid.shape[axis] * self.width
        shared = grid.shape[axis] % self.width or any(size % tokens for size in batch.sizes)
        if shared:
            return (place + batch.uniform(grid.num_tokens)).argsort(dim=1)
        return place.argsort(dim=1, stable=True)

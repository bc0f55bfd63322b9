"""Groups that are tubes: the same places at all times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.partitions import Partition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from selfalign.partitions import Ungrouped


@register("tubes")
@dataclass(frozen=True)
class Tubes(Partition):
    """Tokens at one place of all frames are together (VideoMAE, arXiv:2203.12602), and groups take whole
    tubes at random; in an image a tube is a column, and a signal is one tube, split in time.

    Where a group's size is no multiple of a tube, the last tube it takes is shared with the next group.
    """

    def order(self, batch: Ungrouped) -> Int[Tensor, "B N"]:
        """Tokens by their tube's random rank, and within a tube by time."""
        frames = batch.grid.shape[0]
        rank = batch.uniform(batch.grid.num_tokens // frames)
        return rank.repeat(1, frames).argsort(dim=1, stable=True)

"""Groups that are tubes: the same places at all times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.partitions import Partition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Generator, Tensor

    from selfalign.tokens import TokenGrid


@register("tubes")
@dataclass(frozen=True)
class Tubes(Partition):
    """Tokens at one place of all frames are together (VideoMAE, arXiv:2203.12602), and groups take whole
    tubes at random; in an image a tube is a column, and a signal is one tube, split in time.

    Where a group's size is no multiple of a tube, the last tube it takes is shared with the next group.
    """

    def order(
        self,
        grid: TokenGrid,
        sizes: tuple[int, ...],
        batch: int,
        generator: Generator,
        x0: Float[Tensor, "B C *sides"] | None,
    ) -> Int[Tensor, "B N"]:
        """Tokens by their tube's random rank, and within a tube by time."""
        import torch

        device, tubes = generator.device, grid.num_tokens // grid.shape[0]
        rank = torch.rand(batch, tubes, generator=generator, device=device)
        return rank.repeat(1, grid.shape[0]).argsort(dim=1, stable=True)

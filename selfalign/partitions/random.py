"""The paper's partition: a random subset of the tokens (Eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.partitions import Partition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Generator, Tensor

    from selfalign.tokens import TokenGrid


@register("random")
@dataclass(frozen=True)
class Random(Partition):
    """Every token is as likely as any other to be in a group."""

    def order(
        self,
        grid: TokenGrid,
        sizes: tuple[int, ...],
        batch: int,
        generator: Generator,
        x0: Float[Tensor, "B C *sides"] | None,
    ) -> Int[Tensor, "B N"]:
        """A uniformly random permutation of each sample's tokens."""
        import torch

        device = generator.device
        return torch.rand(batch, grid.num_tokens, generator=generator, device=device).argsort(dim=1)

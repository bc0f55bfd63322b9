"""Groups that are the fields of a checkerboard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.partitions import Partition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Generator, Tensor

    from selfalign.tokens import TokenGrid


@register("checkerboard")
@dataclass(frozen=True)
class Checkerboard(Partition):
    """Fields of K colours in turn along every diagonal; which colour is first is drawn per sample.

    With equal sizes a group is one colour. Otherwise it takes the tokens of its colour at random, or all of
    them and some of the next colour.
    """

    field: int = 1
    """Side of a field, in tokens."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("field", 1, 1e6, "a number from 1")

    def order(
        self,
        grid: TokenGrid,
        sizes: tuple[int, ...],
        batch: int,
        generator: Generator,
        x0: Float[Tensor, "B C *sides"] | None,
    ) -> Int[Tensor, "B N"]:
        """Tokens by colour, and within a colour at random."""
        import torch

        device, colours = generator.device, len(sizes)
        first = torch.randint(colours, (batch, 1), generator=generator, device=device)
        diagonal = (grid.coordinates(device) // self.field).sum(dim=1)
        colour = (diagonal + first) % colours
        within = torch.rand(batch, grid.num_tokens, generator=generator, device=device)
        return (colour + within).argsort(dim=1)

"""Groups that are rectangles of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.partitions import Partition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from selfalign.partitions import Ungrouped


@register("blocks")
@dataclass(frozen=True)
class Blocks(Partition):
    """All groups but the last are rectangles (boxes) at random places; the last one is the rest.

    A rectangle of exactly the group's size need not exist: the group then is the smallest one that holds
    it, less some tokens of its border, or with some tokens beside it where an earlier group was in its way.
    """

    largest_aspect: float = 2.0
    """Longest over shortest side of a rectangle, drawn log-uniformly up to this."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("largest_aspect", 1, 1e3, "a number from 1")

    def order(self, batch: Ungrouped) -> Int[Tensor, "B N"]:
        """Each group takes the free tokens that are nearest to its rectangle's middle."""
        import torch

        places = batch.grid.coordinates(batch.device).float()
        lengths = places.amax(dim=0) + 1
        axes, sizes = len(batch.grid.shape), batch.sizes
        taken = torch.zeros(
            batch.samples, batch.grid.num_tokens, dtype=torch.bool, device=batch.device
        )
        groups = []
        for size in sizes[:-1]:
            stretch = batch.uniform(axes) - 0.5
            stretch = self.largest_aspect ** (stretch - stretch.mean(dim=1, keepdim=True))
            sides = (size ** (1 / axes) * stretch).clamp(min=1).minimum(lengths)
            # What one side had to give up, the others take.
            sides = (sides * (size / sides.prod(dim=1, keepdim=True)) ** (1 / axes)).minimum(
                lengths
            )
            place = batch.uniform(axes)
            middle = place * (lengths - sides) + (sides - 1) / 2
            beyond = ((places - middle[:, None]).abs() / sides[:, None]).amax(dim=2)
            # Equally far tokens are taken at random.
            beyond += 1e-4 * batch.uniform(batch.grid.num_tokens)
            chosen = beyond.masked_fill(taken, torch.inf).argsort(dim=1)[:, :size]
            taken = taken.scatter(1, chosen, True)
            groups.append(chosen)
        rest = taken.to(torch.uint8).argsort(dim=1, stable=True)[:, : sizes[-1]]
        return torch.cat([*groups, rest], dim=1)

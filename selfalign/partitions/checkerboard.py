"""Groups that are the fields of a checkerboard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.partitions import Partition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from selfalign.partitions import Ungrouped


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

    def check_in(self, config: Any) -> None:
        """There must be two fields."""
        grid = getattr(config.model, "grid", None)
        if grid is None:  # the data's shapes are not known yet
            return
        tokens = max(grid.shape)
        self.require(
            self.field < tokens, "field", f"of {tokens} tokens that is one field; allowed is less"
        )

    def order(self, batch: Ungrouped) -> Int[Tensor, "B N"]:
        """Tokens by colour, and within a colour at random."""
        colours = len(batch.sizes)
        first = batch.integers(colours, 1)
        diagonal = (batch.grid.coordinates(batch.device) // self.field).sum(dim=1)
        colour = (diagonal + first) % colours
        return (colour + batch.uniform(batch.grid.num_tokens)).argsort(dim=1)

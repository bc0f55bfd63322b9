"""The paper's partition: a random subset of the tokens (Eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.partitions import Partition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from selfalign.partitions import Ungrouped


@register("random")
@dataclass(frozen=True)
class Random(Partition):
    """Every token is as likely as any other to be in a group."""

    def order(self, batch: Ungrouped) -> Int[Tensor, "B N"]:
        """A uniformly random permutation of each sample's tokens."""
        return batch.uniform(batch.grid.num_tokens).argsort(dim=1)

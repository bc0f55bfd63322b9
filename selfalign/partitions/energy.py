"""Groups by the energy of tokens: detail apart from background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.partitions.ranked import Ranked
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.partitions import Ungrouped


@register("energy")
@dataclass(frozen=True)
class Energy(Ranked):
    """Tokens that differ much from their sample's mean are apart from those that do not."""

    def scores(self, batch: Ungrouped) -> Float[Tensor, "B N"] | None:
        """The mean square of a clean patch, less the sample's mean of every channel; 0 where nothing is."""
        if batch.x0 is None:
            return None
        sides = tuple(range(2, batch.x0.ndim))
        mean = batch.x0.nanmean if batch.padded else batch.x0.mean
        centred = batch.x0 - mean(dim=sides, keepdim=True)
        if batch.padded:
            centred = centred.nan_to_num(0)
        return batch.grid.patchify(centred).square().mean(dim=2)

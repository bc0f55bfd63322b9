"""SRA's projection head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.projectors import Projector

if TYPE_CHECKING:
    from torch import nn

    from selfalign.tokens import TokenGrid


@register("sra")
@dataclass(frozen=True)
class SRAProjector(Projector):
    """Two linear layers with SiLU between them, twice as wide inside (arXiv:2505.02831)."""

    def build(self, width: int, target_width: int, grid: TokenGrid) -> nn.Module:
        """See `Projector.build`."""
        from selfalign.heads import ProjectionHead

        return ProjectionHead(width, target_width)

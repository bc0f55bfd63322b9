"""REPA's projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.projectors import Projector

if TYPE_CHECKING:
    from torch import nn

    from selfalign.tokens import TokenGrid

MAX_WIDTH = 2**16


@register("mlp3")
@dataclass(frozen=True)
class Mlp3Projector(Projector):
    """Three linear layers with SiLU between them (REPA, arXiv:2410.06940)."""

    width: int = 2048
    """Features within; REPA's are 2048."""

    def check(self) -> None:
        """Limits of the width."""
        self.require_number("width", 1, MAX_WIDTH, f"a number from 1 to {MAX_WIDTH}")

    def build(self, width: int, target_width: int, grid: TokenGrid) -> nn.Module:
        """See `Projector.build`."""
        from selfalign.heads import Mlp3Head

        return Mlp3Head(width, self.width, target_width)

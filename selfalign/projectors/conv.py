"""iREPA's projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.parts import register
from selfalign.projectors import Projector

if TYPE_CHECKING:
    from torch import nn

    from selfalign.tokens import TokenGrid

MAX_KERNEL = 31


@register("conv")
@dataclass(frozen=True)
class ConvProjector(Projector):
    """A zero-padded convolution over the token grid (iREPA, 2025)."""

    kernel: int = 3
    """Side of the kernel, in tokens; odd."""

    def check(self) -> None:
        """The kernel has a middle."""
        self.require(
            1 <= self.kernel <= MAX_KERNEL and self.kernel % 2 == 1,
            "kernel",
            f"allowed are odd numbers from 1 to {MAX_KERNEL}",
        )

    def check_in(self, config: Any) -> None:
        """It runs over the whole grid."""
        config.views.require_all_tokens(self)

    def build(self, width: int, target_width: int, grid: TokenGrid) -> nn.Module:
        """See `Projector.build`."""
        from selfalign.heads import conv_head

        return conv_head(width, target_width, self.kernel, grid)

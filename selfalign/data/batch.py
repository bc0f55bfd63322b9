"""A batch, as the stream hands it out and a training step takes it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Batch(NamedTuple):
    """Training images with their labels, and what encoders made of them."""

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, "B"]
    features: Mapping[str, Float[Tensor, "B h w Z"]] = MappingProxyType({})
    """By encoder, over its own token grid."""

    def to(self, device: torch.device) -> "Batch":
        """On a device, without waiting for it."""
        images, labels, features = self
        return Batch(
            images.to(device, non_blocking=True),
            labels.to(device, non_blocking=True),
            {name: held.to(device, non_blocking=True) for name, held in features.items()},
        )

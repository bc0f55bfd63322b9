"""A batch, as the stream hands it out and a training step takes it."""

import functools
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


def beside(device: torch.device, batch: Batch) -> Batch:
    """A batch on a device, copied while the device still works on the steps before.

    Training asks for a step's batch before the device has done the last one. On its own stream the copy
    does not queue behind that.
    """
    if device.type != "cuda":
        return batch.to(device)
    stream, training = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        moved = batch.to(device)
    training.wait_stream(stream)
    for tensor in (moved.images, moved.labels, *moved.features.values()):
        tensor.record_stream(training)
    return moved


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device that copies batches."""
    return torch.cuda.Stream(device)

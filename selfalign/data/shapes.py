"""Samples of any kind as pictures."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def as_pictures(samples: Float[Tensor, "B C *sides"]) -> Float[Tensor, "B C H W"]:
    """Samples of any kind as pictures: those who look at pictures can look at all.

    Images stay as they are. A signal's channels are the rows of a grey picture, and a video's frames stand
    below each other.
    """
    if samples.ndim == 4:
        return samples
    samples = samples.nan_to_num(0)  # beyond the end of a shorter one
    return samples[:, None] if samples.ndim == 3 else samples.flatten(2, 3)


def picture_shape(channels: int, sides: Sequence[int]) -> tuple[int, int, int]:
    """C, H and W of what `as_pictures` makes of samples."""
    _, found, height, width = as_pictures(torch.empty(1, channels, *sides, device="meta")).shape
    return found, height, width

"""Samples of any kind as pictures, and pictures as bytes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

FRAMES_SHOWN = 4
"""Of a video where there is room for a strip of it and not for all."""


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


def side_by_side(
    pictures: UInt8[Tensor, "M C H W"], sides: Sequence[int]
) -> UInt8[Tensor, "M C h w"]:
    """Pictures of samples for the eye: of a video a few frames beside each other, from its first to its last.

    Args:
        pictures: what `to_uint8` made of samples.
        sides: of the data: frames, height and width of videos, whose pictures alone change.
    """
    if len(sides) != 3 or pictures.shape[2] != sides[0] * sides[1]:
        return pictures
    chosen = torch.linspace(0, sides[0] - 1, min(sides[0], FRAMES_SHOWN)).round().long()
    frames = pictures.unflatten(2, (sides[0], sides[1]))[:, :, chosen]
    return frames.transpose(2, 3).flatten(3)


def to_uint8(images: Float[Tensor, "B C *sides"]) -> UInt8[Tensor, "B C H W"]:
    """Images in [-1, 1] as bytes, clamped and rounded; signals and videos as pictures of them."""
    return ((as_pictures(images).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

"""What a set of samples is written as, by kind: an array, and a picture of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.data.shapes import to_uint8
from selfalign.sampling.kinds import CAPTION_COLUMNS, draw_captioned, draw_moving, draw_panels
from selfalign.sampling.pictures import MAX_COLUMNS, draw_samples

Array = np.ndarray[Any, Any]
CAPTIONED = 5 * CAPTION_COLUMNS
"""Samples of a picture with captions."""


def as_array(samples: Float[Tensor, "B C *sides"]) -> Array:
    """Channels last: images (B, H, W, C) and videos (B, T, H, W, C) as bytes, signals (B, L, C) as floats."""
    if samples.ndim == 3:
        return samples.movedim(1, -1).float().cpu().numpy()
    if samples.ndim == 4:
        return to_uint8(samples).permute(0, 2, 3, 1).cpu().numpy()
    samples = samples.nan_to_num(0)  # beyond the end of a shorter one
    frames = [to_uint8(samples[:, :, time]) for time in range(samples.shape[2])]
    return torch.stack(frames, dim=1).permute(0, 1, 3, 4, 2).cpu().numpy()


def draw_set(
    path: Path, samples: Array, labels: Int[Array, "M"], names: Sequence[str], captioned: bool
) -> None:
    """Save a picture of up to 100 samples; of videos also a moving one, `PATH.gif`.

    Args:
        path: the picture's file.
        samples: from `as_array`.
        labels: one per sample.
        names: by label; empty for an unconditional model.
        captioned: whether names are texts, which stand below each sample.
    """
    if samples.ndim == 4 and not captioned:
        return draw_samples(path, samples, labels, names)
    tensors = torch.from_numpy(samples).movedim(-1, 1).float()
    if samples.dtype == np.uint8:
        tensors = tensors / 127.5 - 1
    if captioned:
        if tensors.ndim == 5:
            draw_moving(path.with_suffix(".gif"), tensors[:CAPTIONED], CAPTION_COLUMNS)
        captions = [names[label] for label in labels[:CAPTIONED].tolist()]
        return draw_captioned(path, tensors[:CAPTIONED], captions, f"{len(samples)} samples")
    classes = sorted(set(labels.tolist()))[:MAX_COLUMNS] if names else [0]
    by_class = [np.flatnonzero(labels == k)[:MAX_COLUMNS] for k in classes]
    rows = min(map(len, by_class))
    order = [int(column[row]) for row in range(rows) for column in by_class]
    columns = [names[k] if k < len(names) else str(k) for k in classes] if names else [""]
    draw_panels(path, {"": tensors[order]}, columns, f"{len(samples)} samples")

"""What every source of images is to `prepare`."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from selfalign.data.latents.store import LARGEST_CLASSES
from selfalign.errors import UserError

FINGERPRINT_IMAGES = 64
"""How many images go into the fingerprint of a source that has no files to name."""


@dataclass(frozen=True)
class Source:
    """Images in a fixed order."""

    names: Sequence[str]
    """By which messages name each image, and which decide what is held out."""
    labels: np.ndarray
    """One per image."""
    class_names: tuple[str, ...]
    """Names by label; empty for a source without classes."""
    fingerprint: str
    """Changes when the source does."""
    load: Callable[[int], Any]
    """The i-th, as an opened image, or as an array of moments (2C, H, W). Can be pickled."""
    moments: bool = False
    """Whether the images are stored as a VAE's moments already."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Files or rows that are no images of the source, by what they are."""


def without(source: Source, left_out: Sequence[int]) -> Source:
    """A source without the images at some positions."""
    if not left_out:
        return source
    kept = np.setdiff1d(np.arange(len(source.names)), left_out)
    return replace(
        source,
        names=[source.names[index] for index in kept],
        labels=source.labels[kept],
        load=_Chosen(source.load, tuple(kept.tolist())),
    )


@dataclass(frozen=True)
class _Chosen:
    load: Callable[[int], Any]
    positions: tuple[int, ...]

    def __call__(self, index: int) -> Any:
        return self.load(self.positions[index])


def numbered_classes(labels: np.ndarray, where: object) -> tuple[str, ...]:
    """Class names for a source that only numbers its classes.

    Raises:
        UserError: a number is negative, or larger than any number of classes.
    """
    if not len(labels):
        return ()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= LARGEST_CLASSES:
        raise UserError(
            f"{where} has labels from {low} to {high}: allowed are 0 to {LARGEST_CLASSES - 1:,}"
        )
    return tuple(str(label) for label in range(high + 1))


def fingerprint_sample(labels: np.ndarray, content: Callable[[int], bytes]) -> str:
    """For sources that have no file per image: all labels, and images at equal distances."""
    digest = hashlib.sha256(labels.tobytes())
    for index in np.linspace(0, len(labels) - 1, min(len(labels), FINGERPRINT_IMAGES)).astype(int):
        digest.update(content(int(index)))
    return digest.hexdigest()[:16]

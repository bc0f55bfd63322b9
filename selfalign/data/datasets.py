"""Data sets by name, each with fixed, disjoint training and held-out splits."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from selfalign.data.contents import Recorded
from selfalign.data.folder import FolderSplit
from selfalign.data.source import DataSource, MemorySplit, Split, SubsetSplit
from selfalign.errors import UserError
from selfalign.sections import DataConfig

HELDOUT_SEED = 20260702
"""Splits sets that come without a test split. Not the run's seed: the split never changes."""


def open_data(config: DataConfig, recorded: Recorded | None = None) -> DataSource:
    """Open the configured data set.

    Args:
        config: which one, and where.
        recorded: what a run that goes on recorded of its data. A folder's images then keep the places
            that they had when it began, whatever is gone or new since; whether that is the same data
            is for the caller to decide, by `fingerprint` and `describe_changes`.

    Raises:
        UserError: files are missing, unreadable or empty; the message names them.
    """
    chosen = config.source
    try:
        if recorded is None:
            source = chosen.open(config)
        else:
            whole = whole_fingerprint(recorded.fingerprint, config)
            source = chosen.reopen(config, replace(recorded, fingerprint=whole))
    except OSError as error:  # of the path as a whole: files are named where they are read
        raise UserError(f"data.root is {config.root!r}: {error.strerror or error}") from error
    if not len(source.train) or not len(source.heldout):
        part = "training" if not len(source.train) else "held-out"
        raise UserError(f"data set {config.name} in {config.root} holds no {part} images")
    return source if config.train_fraction == 1 else _train_on_fraction(source, config)


def whole_fingerprint(fingerprint: str, config: DataConfig) -> str:
    """The fingerprint of a data set, of which the configured share of training images is used."""
    return fingerprint.removesuffix(_share(config))


def _share(config: DataConfig) -> str:
    """What a fingerprint says of the share of the training images that is used."""
    return "" if config.train_fraction == 1 else f"-{config.train_fraction:g}"


def image_name(split: Split, index: int) -> str:
    """What a message calls an image: its file, or its number where it has none."""
    while isinstance(split, SubsetSplit):
        index, split = int(split.chosen[index]), split.split
    return split.name(index) if isinstance(split, FolderSplit) else f"number {index}"


def _train_on_fraction(source: DataSource, config: DataConfig) -> DataSource:
    """Keep a share of the training images: the first of an order that never changes."""
    count = max(1, round(config.train_fraction * len(source.train)))
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(HELDOUT_SEED))
    return replace(
        source,
        train=SubsetSplit(source.train, order[:count].sort().values),
        fingerprint=source.fingerprint + _share(config),
    )


def in_memory(
    config: DataConfig,
    images: Tensor,
    labels: Tensor,
    heldout_images: Tensor,
    heldout_labels: Tensor,
    class_names: Sequence[str],
) -> DataSource:
    """A data set of samples (M, C, *sides) that are all in memory: bytes, or floats in [-1, 1].

    Args:
        config: `flip` is used.
        images, labels: the training split.
        heldout_images, heldout_labels: the held-out one.
        class_names: by label.
    """
    digest = hashlib.sha256()
    for tensor in (images, labels, heldout_images, heldout_labels):
        digest.update(tensor.numpy().tobytes())
    _, channels, *sides = images.shape
    return DataSource(
        train=MemorySplit(images, labels, config.flip),
        heldout=MemorySplit(heldout_images, heldout_labels),
        channels=channels,
        image_size=tuple(sides),
        class_names=tuple(class_names),
        fingerprint=digest.hexdigest()[:16],
    )

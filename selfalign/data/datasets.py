"""Data sets with fixed, disjoint training and held-out splits.

A split reads many images at once, as float32 tensors (C, H, W): pixels in [-1, 1], or latents, which
a source's `decode` turns into such images.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from selfalign.config import DataConfig
from selfalign.data import files, folder
from selfalign.errors import UserError

HELDOUT_SEED = 20260702
"""Splits sets that come without a test split. Not the run's seed: the split never changes."""


class Split(Protocol):
    """One half of a data set."""

    @property
    def reads_in_threads(self) -> bool:
        """Whether what reads ahead are threads or processes.

        Threads hand batches over without copying them, but take turns in Python: they suit reading
        that copies, not reading that decodes.
        """
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, "B"]]:
        """What the model sees of these images, and their labels.

        Args:
            indices: which images.
            seeds: one per image, from which all random augmentation follows; None for none.
        """
        ...


def _identity(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class DataSource:
    """A data set: its two splits and what the model needs to know of it."""

    train: Split
    heldout: Split
    channels: int
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    """Names by label; empty for a set without classes."""
    fingerprint: str
    """Changes when the data does."""
    decode: Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B C H W"]] = _identity
    """From what the model sees to images in [-1, 1], on the same device. A UserError if it cannot."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a set without labels."""
        return len(self.class_names)


@dataclass(frozen=True)
class MemorySplit:
    """Images held in memory, as bytes or as floats in [-1, 1]."""

    reads_in_threads: ClassVar[bool] = False
    images: UInt8[Tensor, "M C H W"] | Float[Tensor, "M C H W"]
    labels: Int[Tensor, "M"]
    flip: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.read`."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        if self.flip and seeds is not None:
            mirrored = torch.tensor([bool(seed & 1) for seed in seeds])
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, self.labels[chosen]


@dataclass(frozen=True)
class SubsetSplit:
    """Some images of another split."""

    split: Split
    chosen: Int[Tensor, "M"]
    """Their numbers in it."""

    @property
    def reads_in_threads(self) -> bool:
        """As the whole split."""
        return self.split.reads_in_threads

    def __len__(self) -> int:
        return len(self.chosen)

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.read`."""
        return self.split.read(self.chosen[torch.as_tensor(indices)].tolist(), seeds)


def _train_on_fraction(source: DataSource, fraction: float) -> DataSource:
    """Keep a share of the training images: the first of an order that never changes."""
    count = max(1, round(fraction * len(source.train)))
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(HELDOUT_SEED))
    return replace(
        source,
        train=SubsetSplit(source.train, order[:count].sort().values),
        fingerprint=f"{source.fingerprint}-{fraction:g}",
    )


def _open_digits(config: DataConfig) -> DataSource:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(HELDOUT_SEED))
    images, labels = images[order], labels[order]
    return _in_memory(config, images[400:], labels[400:], images[:400], labels[:400], "0123456789")


def _in_memory(
    config: DataConfig,
    images: Tensor,
    labels: Tensor,
    heldout_images: Tensor,
    heldout_labels: Tensor,
    class_names: Sequence[str],
) -> DataSource:
    digest = hashlib.sha256()
    for tensor in (images, labels, heldout_images, heldout_labels):
        digest.update(tensor.numpy().tobytes())
    _, channels, height, width = images.shape
    return DataSource(
        train=MemorySplit(images, labels, config.flip),
        heldout=MemorySplit(heldout_images, heldout_labels),
        channels=channels,
        image_size=(height, width),
        class_names=tuple(class_names),
        fingerprint=digest.hexdigest()[:16],
    )


def _open_mnist(config: DataConfig) -> DataSource:
    return _in_memory(config, *files.read_mnist(Path(config.root), "mnist"), "0123456789")


def _open_fashion_mnist(config: DataConfig) -> DataSource:
    names = [
        "t-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "boot",
    ]
    return _in_memory(config, *files.read_mnist(Path(config.root), "fashion-mnist"), names)


def _open_cifar10(config: DataConfig) -> DataSource:
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    return _in_memory(config, *files.read_cifar10(Path(config.root)), names)


def _open_folder(config: DataConfig) -> DataSource:
    train, heldout, class_names, fingerprint = folder.open_folder(
        Path(config.root), config.image_size, config.flip
    )
    side = config.image_size
    return DataSource(train, heldout, 3, (side, side), class_names, fingerprint)


def _open_latents(config: DataConfig) -> DataSource:
    from selfalign.data.latents.reader import open_latents

    return open_latents(config)


_OPENERS: dict[str, Callable[[DataConfig], DataSource]] = {
    "digits": _open_digits,
    "mnist": _open_mnist,
    "fashion-mnist": _open_fashion_mnist,
    "cifar10": _open_cifar10,
    "folder": _open_folder,
    "latents": _open_latents,
}


def open_data(config: DataConfig) -> DataSource:
    """Open the configured data set.

    Raises:
        UserError: files are missing, unreadable or empty; the message names them.
    """
    source = _OPENERS[config.name](config)
    if not len(source.train) or not len(source.heldout):
        raise UserError(f"data set {config.name} in {config.root} is empty")
    return (
        source if config.train_fraction == 1 else _train_on_fraction(source, config.train_fraction)
    )

"""What every data set is to the rest: two splits of images, and what a model needs to know of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from selfalign.data.contents import Contents
from selfalign.data.shapes import picture_shape
from selfalign.data.summary import Summary


class Split(Protocol):
    """One half of a data set."""

    @property
    def reads_in_threads(self) -> bool:
        """Whether what reads ahead are threads or processes.

        Threads hand batches over without copying them, but take turns in Python: they suit reading
        that copies, not reading that decodes.
        """
        ...

    @property
    def labels(self) -> Int[Tensor, "M"]:
        """Of all images; 0 in a set without classes."""
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


class Features(Protocol):
    """Features of a training split's images, which an encoder has made of them once."""

    @property
    def encoder_sha256(self) -> str:
        """Hash of the encoder (`encoder_sha256`)."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, columns and features of the tokens of an image."""
        ...

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "B h w Z"]:
        """Those of these images, mirrored where `Split.read` mirrors them. Arguments as there."""
        ...


def _identity(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class DataSource:
    """A data set: its two splits and what the model needs to know of it.

    A split reads many images at once, as float32 tensors (C, H, W): pixels in [-1, 1], or latents,
    which `decode` turns into such images.
    """

    train: Split
    heldout: Split
    channels: int
    image_size: tuple[int, ...]
    """Height and width; one length of signals, frames before them of videos."""
    class_names: tuple[str, ...]
    """Names by label; empty for a set without classes."""
    fingerprint: str
    """Changes when the data does, and not with the place where it is."""
    decode: Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B C H W"]] = _identity
    """From what the model sees to images in [-1, 1], on the same device. A UserError if it cannot."""
    contents: Contents | None = None
    """Of which files it is made, where it is made of files that may change one by one."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many files or rows are not part of it, by what they are."""

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """C, H and W of a sample as a picture."""
        return picture_shape(self.channels, self.image_size)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a set without labels."""
        return len(self.class_names)

    @property
    def summary(self) -> Summary:
        """What was found."""
        classes = max(1, self.num_classes)
        train, heldout = (
            tuple(torch.bincount(split.labels, minlength=classes).tolist())
            for split in (self.train, self.heldout)
        )
        return Summary(train, heldout, self.class_names, self.left_out)


@dataclass(frozen=True)
class MemorySplit:
    """Images held in memory, as bytes or as floats in [-1, 1]."""

    reads_in_threads: ClassVar[bool] = False
    images: UInt8[Tensor, "M C *sides"] | Float[Tensor, "M C *sides"]
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
            mirrored = mirrored.view(-1, *[1] * (images.ndim - 1))
            images = torch.where(mirrored, images.flip(-1), images)
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

    @property
    def labels(self) -> Int[Tensor, "M"]:
        """Of the chosen images."""
        return self.split.labels[self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.read`."""
        return self.split.read(self.chosen[torch.as_tensor(indices)].tolist(), seeds)

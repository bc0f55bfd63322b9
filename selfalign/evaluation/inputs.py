"""Sets of images to be compared: `.npz` files, folders, splits of data sets."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from selfalign.arrays import Array, Npz
from selfalign.data.images import parse_colour, read_header, read_image
from selfalign.data.listing import list_files, require_one_split
from selfalign.data.shapes import to_uint8
from selfalign.data.source import DataSource
from selfalign.errors import UserError
from selfalign.names import encode_name, printable


@dataclass(frozen=True)
class ImageSet:
    """Images that are read when needed, and never all at once."""

    name: str
    """What messages and reports call the set."""
    count: int
    shape: tuple[int, int, int]
    """C, H and W of every image."""
    fingerprint: str
    """Changes when an image does."""
    reader: Callable[[Sequence[int]], UInt8[Tensor, "B C H W"]]
    labels: Int[Tensor, "M"] | None = None
    """One class per image, where the set says."""

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> UInt8[Tensor, "B C H W"]:
        """The images of the given numbers.

        Raises:
            UserError: a file has become unreadable, or holds an image of another kind.
        """
        batch = self.reader(indices)
        # Laid out the same wherever it comes from: convolutions round by the layout.
        return torch.empty(batch.shape, dtype=torch.uint8).copy_(batch)

    def first(self, count: int) -> "ImageSet":
        """The set's first images.

        Raises:
            UserError: the set has fewer.
        """
        if count > self.count:
            raise UserError(f"--num is {count}: {self.name} holds {self.count} images")
        if count == self.count:
            return self
        labels = None if self.labels is None else self.labels[:count]
        return ImageSet(
            self.name, count, self.shape, f"{self.fingerprint}:{count}", self.reader, labels
        )

    def choose(self, numbers: Sequence[int], name: str) -> "ImageSet":
        """Some of the set's images, by number; what messages call them follows the set's name."""
        chosen = torch.as_tensor(numbers)
        labels = None if self.labels is None else self.labels[chosen]
        digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()[:16]
        return ImageSet(
            f"{self.name}, {name}",
            len(chosen),
            self.shape,
            f"{self.fingerprint}:{digest}",
            lambda indices: self.reader(chosen[torch.as_tensor(indices)].tolist()),
            labels,
        )

    def require_like(self, other: "ImageSet") -> None:
        """Refuse to compare with images of another size or number of channels."""
        if self.shape != other.shape:
            raise UserError(
                f"{self.name} holds images of {_describe(self.shape)}, {other.name} of "
                f"{_describe(other.shape)}: both must be the same"
            )


def open_images(path: Path, background: str = "white") -> ImageSet:
    """A set of samples: a `.npz` with `arr_0` (and labels `arr_1`), or a folder of images.

    A folder's images are grey if all of them are, and else grey ones are repeated to three channels.

    Args:
        path: the file, or the folder, whose subfolders are part of it.
        background: colour behind what is transparent.

    Raises:
        UserError: there is nothing at the path, or it is damaged or of another format.
    """
    if path.is_dir():
        return _open_folder(path, background)
    if not path.is_file():
        raise UserError(f"{path} does not exist: allowed are a .npz file or a folder of images")
    arrays = Npz(path)
    if "arr_0" not in arrays:
        raise UserError(
            f"{path} holds {', '.join(arrays) or 'nothing'}: needed is arr_0, the images"
        )
    return images_of(path, arrays)


def images_of(path: Path, arrays: Mapping[str, Array]) -> ImageSet:
    """The images `arr_0` of an opened `.npz`: uint8, or floats from 0 to 1, (M, H, W, C)."""
    images = arrays["arr_0"]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise UserError(
            f"arr_0 of {path} has the shape {images.shape}: allowed is (M, H, W, C) with 1 or 3 "
            "channels"
        )
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise UserError(
            f"arr_0 of {path} holds {images.dtype}: allowed are uint8, or floats from 0 to 1"
        )
    labels = arrays.get("arr_1")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(
            f"arr_1 of {path} is {labels.dtype} of shape {labels.shape}: allowed is one whole number "
            f"for each of the {len(images)} images"
        )

    def read(indices: Sequence[int]) -> Tensor:
        batch = images[np.asarray(indices)]
        if batch.dtype != np.uint8:
            if not (batch.min() >= 0 and batch.max() <= 1):  # false for NaN
                raise UserError(
                    f"arr_0 of {path} holds floats from {batch.min():g} to {batch.max():g}: allowed "
                    "are uint8, or floats from 0 to 1"
                )
            batch = np.round(batch * 255).astype(np.uint8)
        return torch.from_numpy(batch).permute(0, 3, 1, 2)

    count, height, width, channels = images.shape
    return ImageSet(
        name=path.name,
        count=count,
        shape=(channels, height, width),
        fingerprint=hash_file(path),
        reader=read,
        labels=None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )


def open_split(name: str, source: DataSource, half: Literal["training", "held-out"]) -> ImageSet:
    """One half of a data set, without augmentation."""
    split = source.train if half == "training" else source.heldout
    return ImageSet(
        name=f"{name} ({half} images)",
        count=len(split),
        shape=source.picture_shape,
        fingerprint=f"{source.fingerprint}:{half}",
        reader=lambda indices: to_uint8(split.read(indices)[0]),
    )


def _open_folder(folder: Path, background: str) -> ImageSet:
    listing = list_files(folder)
    listing.require_usable(folder, skip=False, may_skip=False)
    if not listing.files:
        raise UserError(f"{folder} holds no images")
    require_one_split((file.name for file in listing.files), folder)
    digest = hashlib.sha256()
    grey = len(set(parse_colour(background))) == 1
    sides = []
    for file in listing.files:
        digest.update(encode_name(f"{file.name}\0{hash_file(Path(file.path))}\n"))
        # Of every one, whose header says here what would be found later, after long work.
        is_grey, size = read_header(Path(file.path))
        grey = is_grey and grey
        sides.append(size)
    channels = 1 if grey else 3

    def read_one(index: int) -> UInt8[Tensor, "C H W"]:
        # As it is stored: nothing is resized, which would move every metric.
        return read_image(Path(listing.files[index].path), None, background)[:channels]

    _, height, width = read_one(0).shape

    def require_size(index: int, found: tuple[int, int]) -> None:
        if found != (height, width):
            raise UserError(
                f"{printable(listing.files[index].path)} has {found[0]}×{found[1]} pixels, and "
                f"{printable(listing.files[0].name)} {height}×{width}: all images of a set must be the "
                "same"
            )

    for index, (across, down) in enumerate(sides):
        if sorted((across, down)) != sorted((height, width)):  # some are turned when they are read
            require_size(index, (down, across))

    def read(indices: Sequence[int]) -> Tensor:
        images = [read_one(index) for index in indices]
        for index, image in zip(indices, images, strict=True):
            require_size(index, (image.shape[1], image.shape[2]))
        return torch.stack(images)

    return ImageSet(
        f"{printable(folder.name)}/",
        len(listing.files),
        (channels, height, width),
        digest.hexdigest()[:16],
        read,
    )


def hash_file(path: Path) -> str:
    """16 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _describe(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}×{width} with {channels} channel" + ("s" if channels != 1 else "")

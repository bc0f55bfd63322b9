"""Sets of images to be compared: `.npz` files, folders, splits of data sets."""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from selfalign.data import DataSource
from selfalign.data.folder import IMAGE_SUFFIXES
from selfalign.errors import UserError
from selfalign.sampling.generate import to_uint8

Array = np.ndarray[Any, Any]


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

    def require_like(self, other: "ImageSet") -> None:
        """Refuse to compare with images of another size or number of channels."""
        if self.shape != other.shape:
            raise UserError(
                f"{self.name} holds images of {_describe(self.shape)}, {other.name} of "
                f"{_describe(other.shape)}: both must be the same"
            )


def open_images(path: Path) -> ImageSet:
    """A set of samples: a `.npz` with `arr_0` (and labels `arr_1`), or a folder of images.

    Raises:
        UserError: there is nothing at the path, or it is damaged or of another format.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: allowed are a .npz file or a folder of images")
    arrays = open_npz(path)
    if "arr_0" not in arrays:
        raise UserError(
            f"{path} holds {', '.join(arrays) or 'nothing'}: needed is arr_0, the images"
        )
    return images_of(path, arrays)


def images_of(path: Path, arrays: dict[str, Array]) -> ImageSet:
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


def open_npz(path: Path) -> dict[str, Array]:
    """The arrays of a `.npz`, mapped from the file where they are not compressed.

    Raises:
        UserError: the file is truncated, or no `.npz`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return {
                info.filename.removesuffix(".npy"): _read_member(path, archive, info)
                for info in members
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is truncated or not a .npz file: {error}") from error


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as stream:
        if info.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(stream, allow_pickle=False)
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{info.filename} has the unknown version {version}")
        shape, fortran, dtype = readers[version](stream)
        if dtype.hasobject or dtype.kind == "U" or 0 in shape or not shape:
            return np.lib.format.read_array(archive.open(info), allow_pickle=False)
        header = stream.tell()
    # The member's bytes follow its local header: 30 bytes, then its name and an extra field.
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    start = (
        info.header_offset + 30 + sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    )
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", start + header, shape, order)  # type: ignore[call-overload]


def open_split(name: str, source: DataSource, half: Literal["training", "held-out"]) -> ImageSet:
    """One half of a data set, without augmentation."""
    split = source.train if half == "training" else source.heldout
    return ImageSet(
        name=f"{name} ({half} images)",
        count=len(split),
        shape=(source.channels, *source.image_size),
        fingerprint=f"{source.fingerprint}:{half}",
        reader=lambda indices: to_uint8(split.read(indices)[0]),
    )


def _open_folder(folder: Path) -> ImageSet:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no images")
    first = _read_image(files[0])

    def read(indices: Sequence[int]) -> Tensor:
        images = [_read_image(files[index]) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape != first.shape:
                raise UserError(
                    f"{files[index]} is {_describe(tuple(image.shape))}, {files[0].name} is "
                    f"{_describe(tuple(first.shape))}: all images of a set must be the same"
                )
        return torch.stack(images)

    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    channels, height, width = first.shape
    return ImageSet(
        f"{folder.name}/", len(files), (channels, height, width), digest.hexdigest()[:16], read
    )


def _read_image(path: Path) -> UInt8[Tensor, "C H W"]:
    """An image as it is stored, in grey or colour; nothing is resized, which would move every metric."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L" if image.mode in ("L", "1") else "RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)


def hash_file(path: Path) -> str:
    """16 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _describe(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}×{width} with {channels} channel" + ("s" if channels != 1 else "")

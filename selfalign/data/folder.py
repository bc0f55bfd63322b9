"""A folder of images: class subfolders, or images alone for an unconditional model."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfalign.errors import UserError

IMAGE_SUFFIXES = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
)
HELDOUT_SHARE = 0.1
LONGEST_ASPECT = 16
"""Longer strips are cut to this before they are resized: 1×50,000 pixels would become gigabytes."""


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut the middle square (as ADM prepares ImageNet)."""
    if max(image.size) > LONGEST_ASPECT * min(image.size):
        image = _cut_middle(image, *(min(s, LONGEST_ASPECT * min(image.size)) for s in image.size))
    while min(image.size) >= 2 * size:
        width, height = image.size
        # Halves of odd sides are rounded down, as there; Image.reduce would round them up.
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    return _cut_middle(image.resize((width, height), Image.Resampling.BICUBIC), size, size)


def _cut_middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL's own conversion cuts off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def decode_image(open_image: Callable[[], Image.Image], name: str, size: int) -> Tensor:
    """An image, cropped and resized, as uint8 (3, size, size).

    Of an animation it is the first frame. Transparency and the camera's orientation tag are ignored.

    Args:
        open_image: opens the image; whatever it raises counts as unreadable.
        name: the image in error messages.
        size: side of the square.

    Raises:
        UserError: this is not a readable image; the message names it.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged tags and of large images, and raises for what it cannot read.
            warnings.simplefilter("ignore")
            with open_image() as image:
                pixels = np.array(centre_crop(_as_rgb(image), size))
    except Exception as error:  # the formats' readers raise nearly anything for damaged files
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{printable(name)} is not a readable image: {printable(reason)}"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_image(path: Path, size: int) -> Tensor:
    """An image file as uint8 (3, size, size).

    Raises:
        UserError: the file is not a readable image; the message names it.
    """
    return decode_image(lambda: Image.open(path), str(path), size)


def encode_name(name: str) -> bytes:
    """A file's name as bytes, whether or not it is valid UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """A file's name or a message as one line that any terminal can show."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


@dataclass(frozen=True)
class FolderSplit:
    """Image files and their labels; decoded when read."""

    reads_in_threads: ClassVar[bool] = False
    files: Sequence[tuple[Path, int]]
    image_size: int
    flip: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.read`."""
        images = []
        for position, index in enumerate(indices):
            image = read_image(self.files[index][0], self.image_size)
            if self.flip and seeds is not None and seeds[position] & 1:
                image = image.flip(-1)
            images.append(image)
        labels = torch.tensor([self.files[index][1] for index in indices])
        return torch.stack(images).float() / 127.5 - 1, labels


def image_files(root: Path) -> Iterator[Path]:
    """Image files below a folder; hidden files and folders are none."""
    for path in root.rglob("*"):
        if _is_image(path) and not _hidden(path.relative_to(root)):
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def list_images(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Image files with their labels, in a fixed order, and class names by label.

    Classes are the subfolders, with all that is below them; images without subfolders have no
    class, and label 0.

    Raises:
        UserError: the folder is missing, a class is empty, or images lie beside class subfolders.
    """
    if not root.is_dir():
        raise UserError(f"data.root is {str(root)!r}: there is no such folder")
    class_folders = sorted(
        path for path in root.iterdir() if path.is_dir() and not _hidden(path.relative_to(root))
    )
    found = [
        (path, label)
        for label, folder in enumerate(class_folders or [root])
        for path in sorted(image_files(folder))
    ]
    loose = sorted(filter(_is_image, root.iterdir())) if class_folders else []
    if loose:
        raise UserError(
            f"{printable(str(loose[0]))} lies beside class subfolders: images belong into one of "
            "them, or all into one folder for an unconditional model"
        )
    empty = set(range(len(class_folders))) - {label for _, label in found}
    if empty:
        raise UserError(f"{printable(str(class_folders[min(empty)]))} holds no images")
    return found, tuple(printable(folder.name) for folder in class_folders)


def split_by_hash(names: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Positions of the training part and of the held-out part: the names of the smallest hashes.

    A function of the names alone, so it never changes; at least one is held out.
    """
    by_hash = sorted(
        range(len(names)), key=lambda index: hashlib.sha256(encode_name(names[index])).digest()
    )
    count = max(1, int(len(names) * share))
    return by_hash[count:], by_hash[:count]


def open_folder(
    root: Path, image_size: int, flip: bool
) -> tuple[FolderSplit, FolderSplit, tuple[str, ...], str]:
    """Training split, held-out split, class names and fingerprint of a folder.

    A tenth of the images is held out: those whose relative paths have the smallest hashes.

    Raises:
        UserError: the folder is missing, or holds too few images to split.
    """
    found, names = list_images(root)
    if len(found) < 2:
        raise UserError(
            f"data.root {str(root)!r} holds {len(found)} images: needed are at least 2, in one "
            "subfolder per class, or without subfolders for an unconditional model"
        )
    relative = [path.relative_to(root).as_posix() for path, _ in found]
    train, heldout = split_by_hash(relative, HELDOUT_SHARE)
    digest = hashlib.sha256(f"{image_size}\n".encode())
    for index in (*heldout, *train):
        path, label = found[index]
        digest.update(encode_name(f"{relative[index]}\0{label}\0{path.stat().st_size}\n"))
    return (
        FolderSplit([found[index] for index in train], image_size, flip),
        FolderSplit([found[index] for index in heldout], image_size),
        names,
        digest.hexdigest()[:16],
    )

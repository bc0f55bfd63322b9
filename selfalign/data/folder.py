"""A folder of images: class subfolders, or images alone for an unconditional model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from selfalign.errors import UserError

IMAGE_SUFFIXES = frozenset(Image.registered_extensions())
HELDOUT_SHARE = 0.1


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut the middle square (as ADM prepares ImageNet)."""
    while min(image.size) >= 2 * size:
        image = image.reduce(2)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL's own conversion cuts off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def read_image(path: Path, size: int) -> Tensor:
    """An image file as uint8 (3, size, size).

    Raises:
        UserError: the file is not a readable image; the message names it.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(centre_crop(_as_rgb(image), size))
    except (
        OSError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        ValueError,
        SyntaxError,
    ) as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


@dataclass(frozen=True)
class FolderSplit:
    """Image files and their labels; decoded when read."""

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


def open_folder(
    root: Path, image_size: int, flip: bool
) -> tuple[FolderSplit, FolderSplit, tuple[str, ...], str]:
    """Training split, held-out split, class names and fingerprint of a folder.

    A tenth of the images is held out: those whose relative paths have the smallest hashes.

    Raises:
        UserError: the folder is missing, or holds too few images to split.
    """
    if not root.is_dir():
        raise UserError(f"data.root is {str(root)!r}: there is no such folder")

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(root).parts)

    class_folders = sorted(path for path in root.iterdir() if path.is_dir() and not hidden(path))
    names = tuple(folder.name for folder in class_folders)
    found = [
        (path, label)
        for label, folder in enumerate(class_folders or [root])
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden(path)
    ]
    empty = set(range(len(names))) - {label for _, label in found}
    if empty:
        raise UserError(f"{class_folders[min(empty)]} holds no images")
    if len(found) < 2:
        raise UserError(
            f"data.root {str(root)!r} holds {len(found)} images: needed are at least 2, in one "
            "subfolder per class, or without subfolders for an unconditional model"
        )

    def key(file: tuple[Path, int]) -> str:
        return hashlib.sha256(file[0].relative_to(root).as_posix().encode()).hexdigest()

    by_hash = sorted(found, key=key)
    digest = hashlib.sha256()
    for path, label in by_hash:
        digest.update(
            f"{path.relative_to(root).as_posix()}\0{label}\0{path.stat().st_size}\n".encode()
        )
    count = max(1, int(len(found) * HELDOUT_SHARE))
    train = FolderSplit(by_hash[count:], image_size, flip)
    heldout = FolderSplit(by_hash[:count], image_size)
    return train, heldout, names, digest.hexdigest()[:16]

"""A folder of images: class subfolders, or images alone for an unconditional model."""

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

import msgspec
import torch
from jaxtyping import Int
from torch import Tensor

from selfalign.data.contents import ABSENT, Contents, Recorded
from selfalign.data.images import UnreadableImageError, read_image
from selfalign.data.listing import list_classes
from selfalign.data.source import DataSource
from selfalign.data.splits import order_by_hash, split_in_order
from selfalign.errors import UserError
from selfalign.names import printable
from selfalign.sections import DataConfig

HELDOUT_SHARE = 0.1
CHECK_SECONDS = 0.25
"""How long images are tried when a folder is opened: all of a small one, and some of a large one."""


@dataclass(frozen=True)
class FolderSplit:
    """Image files and their labels; decoded when read.

    Where an image is absent, or unreadable ones are to be left out, the next one stands in for it, so
    that all others keep their places.
    """

    reads_in_threads: ClassVar[bool] = False
    files: Sequence[tuple[Path, int]]
    image_size: int
    flip: bool = False
    background: str = "white"
    """Behind what is transparent."""
    skip_unreadable: bool = False
    absent: frozenset[int] = frozenset()
    """Numbers of the images that are known to be gone or unreadable."""

    @property
    def labels(self) -> Int[Tensor, "M"]:
        """See `Split.labels`."""
        return torch.tensor([label for _, label in self.files])

    def name(self, index: int) -> str:
        """What a message calls an image: its file."""
        return printable(str(self.files[index][0]))

    def __len__(self) -> int:
        return len(self.files)

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.read`."""
        images, labels = [], []
        for position, index in enumerate(indices):
            image, label = self._read_or_next(index)
            if self.flip and seeds is not None and seeds[position] & 1:
                image = image.flip(-1)
            images.append(image)
            labels.append(label)
        return torch.stack(images).float() / 127.5 - 1, torch.tensor(labels)

    def _read_or_next(self, index: int) -> tuple[Tensor, int]:
        for candidate in chain(range(index, len(self)), range(index)):
            if candidate in self.absent:
                continue
            path, label = self.files[candidate]
            try:
                return read_image(path, self.image_size, self.background), label
            except UnreadableImageError as error:
                if not self.skip_unreadable:
                    raise
                warnings.warn(f"{error}; another image stands in for it", stacklevel=2)
        raise UserError(f"no image beside {printable(str(self.files[index][0]))} can be read")


def open_folder(config: DataConfig, recorded: Recorded | None = None) -> DataSource:
    """Open the folder `config.root`.

    A tenth of the images is held out: those whose relative paths have the smallest hashes.

    Args:
        config: the data's settings.
        recorded: of a run that goes on: images keep the places that they had when it began, gone ones
            are passed by, and new ones are no part of it.

    Raises:
        UserError: the folder is missing, holds too few images to split, or one that cannot be read.
    """
    root = Path(config.root)
    listing, labels, class_names = list_classes(root, config.skip_unreadable)
    left_out = listing.passed_over
    if len(labels) < 2:
        raise UserError(
            f"data.root {str(root)!r} holds {len(labels)} images{_instead(left_out)}: needed are at "
            "least 2, in one subfolder per class, or without subfolders for an unconditional model"
        )
    files = listing.files
    contents = Contents(
        class_names,
        tuple(file.name for file in files),
        tuple(labels),
        tuple(file.size for file in files),
    )
    if recorded is not None and recorded.contents is not None:
        contents = _in_recorded_places(contents, recorded.contents, left_out)
    settings = f"{config.image_size}\n"
    if config.background != "white":
        settings += f"{config.background}\n"
    order = order_by_hash(contents.names)
    train, heldout = split_in_order(order, HELDOUT_SHARE, contents.labels)
    former = split_in_order(order, HELDOUT_SHARE)
    fingerprint = contents.digest([*former[1], *former[0]], settings)
    if (train, heldout) != former:
        if recorded is not None and recorded.fingerprint == fingerprint:
            train, heldout = former  # as version 0.1.0 split it
        else:
            fingerprint += "-c"  # no class without a training image
    side = config.image_size
    return DataSource(
        _make_split(root, contents, train, config, config.flip, left_out),
        _make_split(root, contents, heldout, config, False, left_out),
        3,
        (side, side),
        contents.class_names,
        fingerprint,
        contents=contents,
        left_out=left_out,
    )


def _make_split(
    root: Path,
    contents: Contents,
    chosen: Sequence[int],
    config: DataConfig,
    flip: bool,
    left_out: Counter[str],
) -> FolderSplit:
    """A split, some of whose images have been tried: unreadable ones are counted, or an error."""
    files = [(root / contents.names[index], contents.labels[index]) for index in chosen]
    absent = {place for place, index in enumerate(chosen) if contents.sizes[index] == ABSENT}
    tried_until = time.monotonic() + CHECK_SECONDS
    for place, (path, _) in enumerate(files):
        if time.monotonic() > tried_until:
            break
        if place in absent:
            continue
        try:
            read_image(path, config.image_size, config.background)
        except UnreadableImageError:
            if not config.skip_unreadable:
                raise
            absent.add(place)
            left_out["unreadable"] += 1
    return FolderSplit(
        files,
        config.image_size,
        flip,
        config.background,
        config.skip_unreadable,
        frozenset(absent),
    )


def _in_recorded_places(now: Contents, then: Contents, left_out: Counter[str]) -> Contents:
    """The files of then, with their sizes of now."""
    sizes = dict(zip(now.names, now.sizes, strict=True))
    kept = tuple(sizes.get(name, ABSENT) for name in then.names)
    gone = kept.count(ABSENT)
    if new := len(now.names) - (len(kept) - gone):
        left_out["new since the run began"] += new
    if gone:
        left_out["gone since the run began"] += gone
    return msgspec.structs.replace(then, sizes=kept)


def _instead(left_out: Counter[str]) -> str:
    """What is there in place of images."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common(3))
    return f" (besides {kinds})" if kinds else ""

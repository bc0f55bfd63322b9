"""Folders of files: class subfolders of images, and files with their labels in dataset.json."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from selfalign.arrays import read_npy
from selfalign.data.contents import fingerprint_files
from selfalign.data.images import open_image
from selfalign.data.latents.sources.source import Source, numbered_classes
from selfalign.data.listing import Listing, list_classes, list_files
from selfalign.errors import UserError
from selfalign.names import printable
from selfalign.records import read_json


@dataclass(frozen=True)
class _ImageFiles:
    paths: Sequence[str]

    def __call__(self, index: int) -> Image.Image:
        return open_image(self.paths[index])


@dataclass(frozen=True)
class _MomentFiles:
    paths: Sequence[str]

    def __call__(self, index: int) -> np.ndarray:
        return read_npy(Path(self.paths[index]))


def open_classes(root: Path, skip_unreadable: bool) -> Source:
    """Class subfolders of images, or images alone."""
    listing, found, class_names = list_classes(root, skip_unreadable)
    labels = np.array(found, np.int32)
    return _of_files(listing, labels, class_names, moments=False)


class _Listed(msgspec.Struct):
    labels: list[tuple[str, int]] | None


def open_listed(root: Path, skip_unreadable: bool) -> Source:
    """The format of EDM2's tool, which REPA and SRA use: files, and their labels in dataset.json."""
    path = root / "dataset.json"
    entries = read_json(path, _Listed).labels
    listing = list_files(root, suffixes={".npy"})
    moments = bool(listing.files)
    if not moments:
        listing = list_files(root)
    listing.require_usable(root, skip_unreadable)
    names = [file.name for file in listing.files]
    if entries is None:
        return _of_files(listing, np.zeros(len(names), np.int32), (), moments)
    by_name = dict(entries)
    twice = [name for name, count in Counter(name for name, _ in entries).items() if count > 1]
    missing = [name for name in names if name not in by_name]
    unknown = sorted(by_name.keys() - names - listing.unusable.keys())
    if unknown and skip_unreadable:
        listing.passed_over["listed and not there"] += len(unknown)
        unknown = []
    for problem, kind in (
        (twice, "two entries for"),
        (missing, "no entry for"),
        (unknown, "an entry for a file that is not there:"),
    ):
        if problem:
            more = f" (and {len(problem) - 1:,} more)" if len(problem) > 1 else ""
            raise UserError(f"{path} has {kind} {printable(problem[0])!r}{more}")
    numbers = [by_name[name] for name in names]
    class_names = numbered_classes(np.array(numbers), path)
    return _of_files(listing, np.array(numbers, np.int32), class_names, moments)


def _of_files(
    listing: Listing, labels: np.ndarray, class_names: tuple[str, ...], moments: bool
) -> Source:
    names = [file.name for file in listing.files]
    paths = [file.path for file in listing.files]
    return Source(
        names,
        labels,
        class_names,
        fingerprint_files(names, labels, (file.size for file in listing.files)),
        (_MomentFiles if moments else _ImageFiles)(paths),
        moments,
        left_out=listing.passed_over,
    )

"""Which files of a folder are meant: one rule for training, preparing and evaluating.

Links are followed, also to folders, and each folder is visited once; what hides and what systems leave
behind is passed over; what is named like an image and cannot be one is named. No file is opened.
"""

import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from selfalign.data.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES
from selfalign.errors import UserError
from selfalign.names import printable

_LEFT_BY_SYSTEMS = frozenset(
    ["__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"]
)
"""Folders in which desktops and file servers keep thumbnails and what was deleted, in lower case."""
_SPLIT_NAME = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval(uation)?|holdout)"
    r"[\W_]*(set|images?|data)?[\W_\d]*",
    re.IGNORECASE,
)
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test|testing)(?![a-z])")
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
Identity = tuple[int, int]
"""Device and number of a folder, whatever links lead to it."""


class FoundFile(NamedTuple):
    """A file that is meant."""

    path: str
    name: str
    """Relative to the folder of the whole set, with slashes."""
    size: int
    """Bytes."""


@dataclass
class Listing:
    """What a folder holds."""

    files: list[FoundFile] = field(default_factory=list)
    """In the order of their names, part by part."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Files by name that are called images and cannot be read as such, and why."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many other entries there are, by kind."""

    def require_usable(self, folder: Path, skip: bool, may_skip: bool = True) -> None:
        """Refuse files that cannot be read, or count them as left out.

        Args:
            folder: that was listed.
            skip: whether they are left out.
            may_skip: whether the message may say that they can be.

        Raises:
            UserError: there are some, and `skip` is False.
        """
        if not self.unusable:
            return
        if not skip:
            name, why = next(iter(self.unusable.items()))
            more = f" (and {len(self.unusable) - 1:,} more)" if len(self.unusable) > 1 else ""
            raise UserError(
                f"{printable(str(folder / name))} is not a readable image{more}: it is {why}; "
                f"remove or repair it{', or leave such out with skip-unreadable' if may_skip else ''}"
            )
        self.passed_over["unreadable"] += len(self.unusable)


def ignored(name: str) -> bool:
    """Whether an entry of this name is never meant, whatever it is."""
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def is_split_name(name: str) -> bool:
    """Whether a folder or archive is called like a part of a data set: train, val2017, test_images."""
    return _SPLIT_NAME.fullmatch(name) is not None


def list_files(
    root: Path,
    folder: str = "",
    suffixes: Collection[str] = IMAGE_SUFFIXES,
    deep: bool = True,
    only_first: bool = False,
) -> Listing:
    """The files below a folder whose names end in one of these ways.

    Args:
        root: folder of the whole set, to which names are relative.
        folder: name of the folder in it; empty for all of it.
        suffixes: in lower case, with their dots.
        deep: visit the folders in it.
        only_first: stop at the first file that is meant, to tell whether there is any.

    Raises:
        UserError: a folder cannot be read.
    """
    found = Listing()
    visited = set(_identities(root)) if folder else set(_identities(root)[1:])
    waiting, called_images = [folder], []
    while waiting:
        name = waiting.pop()
        entries = _entries(root, name, visited)
        if entries is None:
            found.passed_over["links that lead back"] += 1
            continue
        for entry in entries:
            path, relative = entry.path, f"{name}/{entry.name}" if name else entry.name
            if ignored(entry.name):
                found.passed_over["hidden or of the system"] += 1
                continue
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a million of them
            wanted = suffix in suffixes
            try:
                status = entry.stat()
            except OSError as error:
                if wanted:
                    found.unusable[relative] = f"out of reach ({error.strerror})"
                else:
                    found.passed_over["links to nothing"] += 1
                continue
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFDIR:
                if deep:
                    waiting.append(relative)
                if deep and wanted:
                    called_images.append(relative)
            elif not wanted:
                found.passed_over[f"{suffix or 'without a suffix'}"] += 1
            elif kind != stat.S_IFREG:
                found.unusable[relative] = _KINDS.get(kind, "a device")
            elif status.st_size == 0:
                found.unusable[relative] = "empty"
            elif suffix in UNREADABLE_SUFFIXES:
                found.unusable[relative] = f"of a format that is not read ({suffix})"
            else:
                found.files.append(FoundFile(path, relative, status.st_size))
                if only_first:
                    return found
    found.files.sort(key=lambda file: file.name.split("/"))
    for name in called_images:
        if not any(file.name.startswith(name + "/") for file in found.files):
            found.unusable[name] = "a folder"
    return found


def list_classes(root: Path, skip: bool) -> tuple[Listing, list[int], tuple[str, ...]]:
    """Image files with their labels, in a fixed order, and class names by label.

    Classes are the subfolders, with all that is below them; images without subfolders have no class,
    and label 0.

    Args:
        root: the folder.
        skip: leave out what is called an image and cannot be one.

    Raises:
        UserError: the folder is missing, a class is empty, images lie beside class subfolders, or the
            subfolders are the splits of a data set.
    """
    if root.is_file():
        raise UserError(
            f"data.root is {str(root)!r}, a file: allowed is a folder of images; `selfalign prepare` reads "
            "tar, Parquet and Arrow files"
        )
    if not root.is_dir():
        raise UserError(f"data.root is {str(root)!r}: there is no such folder")
    above = set(_identities(root))
    folders = []
    for entry in sorted(_entries(root, "", set()) or (), key=lambda entry: entry.name):
        with contextlib.suppress(OSError):  # a link to nothing
            status = entry.stat()
            leads_back = (status.st_dev, status.st_ino) in above
            if stat.S_ISDIR(status.st_mode) and not leads_back and not ignored(entry.name):
                folders.append(entry.name)
    if not folders:
        listing = list_files(root)
        listing.require_usable(root, skip)
        return listing, [0] * len(listing.files), ()
    whole, labels = list_files(root, deep=False), []
    if whole.files or whole.unusable:
        loose = next(iter([*(file.name for file in whole.files), *whole.unusable]))
        raise UserError(
            f"{printable(str(root / loose))} lies beside class subfolders: images belong into one of "
            "them, or all into one folder for an unconditional model"
        )
    counts = {}
    for label, folder in enumerate(folders):
        part = list_files(root, folder)
        part.require_usable(root, skip)
        counts[folder] = len(part.files)
        whole.files += part.files
        whole.unusable |= part.unusable
        whole.passed_over += part.passed_over
        labels += [label] * len(part.files)
    splits = [folder for folder in folders if is_split_name(folder)]
    if splits and not any(counts[folder] for folder in folders if folder not in splits):
        raise UserError(
            f"the subfolders of {printable(str(root))} are splits of a data set and no classes "
            f"({', '.join(splits)}): name one of them, as in {printable(str(root / splits[-1]))}"
        )
    for folder, count in counts.items():
        if not count:
            raise UserError(f"{printable(str(root / folder))} holds no images")
    return whole, labels, tuple(printable(folder) for folder in folders)


def require_one_split(names: Iterable[str], where: Path) -> None:
    """Refuse to mix the splits of a data set.

    Args:
        names: of files that would be read together, relative to `where`; words in the names of folders
            and files may say to which split they belong.
        where: the folder that holds them.

    Raises:
        UserError: among them are training and validation or test data.
    """
    found = {word[:2]: word for name in names for word in _SPLIT_WORD.findall(name.lower())}
    if len(found) > 1:
        raise UserError(
            f"{printable(str(where))} holds files of several splits of a data set "
            f"({', '.join(sorted(found.values()))}): give each a folder of its own, and name one of them"
        )


def _identities(folder: Path) -> list[Identity]:
    """Of a folder and of all that it lies in, from which a link would lead back."""
    real = folder.resolve()
    statuses = [path.stat() for path in (real, *real.parents)]
    return [(status.st_dev, status.st_ino) for status in statuses]


def _entries(root: Path, name: str, visited: set[Identity]) -> list[os.DirEntry[str]] | None:
    """What a folder holds; None for one that has been visited."""
    path = os.path.join(root, name) if name else str(root)  # noqa: PTH118
    try:
        status = os.stat(path)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        if identity in visited:
            return None
        visited.add(identity)
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read: {error.strerror}") from error

"""Uncompressed tar files: class folders in them, archives in them (ImageNet), WebDataset's samples."""

import io
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from selfalign.data.contents import fingerprint_files
from selfalign.data.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, open_image
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources.source import Source, numbered_classes
from selfalign.data.listing import ignored
from selfalign.errors import UserError
from selfalign.names import printable

LARGEST_IMAGE = 2**31
"""Bytes of a member that is read as an image."""
DEEPEST = 16
"""Archives within archives."""
LARGEST_NUMBER = 32
"""Characters of a .cls file."""
LABELS_OF_ARCHIVES = ARCHIVE, NONE = "archive", "none"
"""What `label_key` may be: each archive is a class, or only folders within archives are."""


@dataclass(frozen=True)
class _Member:
    archive: Path
    folders: tuple[str, ...]
    """That lead to it: the archive, archives in it, and folders in those."""
    name: str
    offset: int
    size: int

    @property
    def key(self) -> tuple[str, ...]:
        """What a WebDataset's files of one sample have in common: all up to the first dot."""
        return (*self.folders, self.name.partition(".")[0])

    @property
    def ending(self) -> str:
        """The rest, which says what the file is of the sample."""
        return self.name.partition(".")[2].lower()

    @property
    def path(self) -> str:
        """By which it is named."""
        return "/".join((*self.folders, self.name))

    def read(self, limit: int) -> bytes:
        if self.size > limit:
            raise ValueError(f"it has {self.size:,} bytes")
        with self.archive.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


@dataclass(frozen=True)
class _TarImages:
    members: Sequence[_Member]

    def __call__(self, index: int) -> Image.Image:
        return open_image(io.BytesIO(self.members[index].read(LARGEST_IMAGE)))


def open_tars(archives: Sequence[Path], config: PrepareConfig) -> Source:
    """The images of tar files. Members are read where they lie, and never unpacked.

    An image's class is the number in its `.cls` neighbour (WebDataset); without those it is the
    first of the folders and archives that lead to it and do not lead to all images. Archives that are
    parts of one set, being numbered or of WebDataset's samples, are no classes unless that is said.

    Args:
        archives: the files.
        config: which of a sample's images is meant, what classes are, and whether unreadable ones are left
            out.

    Raises:
        UserError: an archive cannot be read, or which images or classes are meant is not clear.
    """
    left_out: Counter[str] = Counter()
    skip = config.skip_unreadable
    if config.label_key not in (None, *LABELS_OF_ARCHIVES):
        raise UserError(
            f"label_key is {config.label_key!r}: allowed for tar files are {', '.join(LABELS_OF_ARCHIVES)}"
        )
    top = Path(os.path.commonpath([archive.parent for archive in archives]))
    members = [member for archive in archives for member in _members(archive, top, left_out, skip)]
    numbers: dict[tuple[str, ...], _Member] = {}
    images = []
    beside: set[tuple[str, ...]] = set()
    for member in members:
        suffix = PurePosixPath(member.name).suffix.lower()
        if member.ending == "cls":
            if member.key in numbers:
                raise UserError(f"{printable(member.path)} is there twice")
            numbers[member.key] = member
        elif suffix not in IMAGE_SUFFIXES:
            left_out[suffix or "without a suffix"] += 1
            beside.add(member.key)
        elif member.size and suffix not in UNREADABLE_SUFFIXES:
            images.append(member)
        elif skip:
            left_out["unreadable"] += 1
        else:
            why = f"of a format that is not read ({suffix})" if member.size else "empty"
            raise UserError(f"{printable(member.path)} is not a readable image: it is {why}")
    is_webdataset = bool(numbers) or any(image.key in beside for image in images)
    images = _one_per_sample(images, config.image_key, is_webdataset, left_out)
    if numbers:
        if alone := len(numbers.keys() - {image.key for image in images}):
            left_out[".cls without an image"] += alone
        labels = np.array([_class_number(m, numbers.get(m.key)) for m in images])
        class_names = numbered_classes(labels, archives[0])
        labels = labels.astype(np.int32)
    else:
        parts = len(archives) > 1 and (is_webdataset or _are_numbered(archives))
        labels, class_names = _classes(images, archives, parts, config.label_key)
    names = [member.path for member in images]
    return Source(
        names,
        labels,
        class_names,
        fingerprint_files(names, labels, (member.size for member in images)),
        _TarImages(images),
        left_out=left_out,
    )


def _one_per_sample(
    images: list[_Member], image_key: str | None, is_webdataset: bool, left_out: Counter[str]
) -> list[_Member]:
    """One image of each sample: the one that the key names, or the one without a further word.

    Raises:
        UserError: which one is meant is not clear, or samples lack it.
    """
    samples: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for image in images:
        samples[image.key].add(image.ending)
    shared = sorted(
        {ending for endings in samples.values() if len(endings) > 1 for ending in endings}
    )
    if image_key is None:
        plain = [ending for ending in shared if "." not in ending]
        alike = len(samples) > 1 and all(
            len(endings) == len(shared) for endings in samples.values()
        )
        counted = any(ending.partition(".")[0].isdigit() for ending in shared)
        if not shared or not (plain or is_webdataset or (alike and not counted)):
            return images  # dots in names say nothing
        if len(plain) != 1:
            raise UserError(
                f"samples hold several images ({', '.join(map(printable, shared[:8]))}): choose one by "
                "--image-key, or unpack the archive if all are meant"
            )
        image_key = plain[0]
        # Beside samples of several images there may be some of one, whatever it ends in.
        chosen = [m for m in images if len(samples[m.key]) == 1 or m.ending == image_key]
    else:
        image_key = image_key.lower().lstrip(".")
        chosen = [image for image in images if image.ending == image_key]
        if not chosen:
            endings = sorted({image.ending for image in images})
            raise UserError(
                f"image_key is {image_key!r}: no image ends so; allowed are "
                f"{', '.join(map(printable, endings[:8]))}"
            )
    if rest := len(images) - len(chosen):
        left_out[f"images beside .{image_key}"] += rest
    return chosen


def _class_number(image: _Member, member: _Member | None) -> int:
    if member is None:
        raise UserError(f"{printable(image.path)} has no .cls file beside it, but others have")
    try:
        return int(member.read(LARGEST_NUMBER))
    except ValueError as error:
        raise UserError(
            f"the .cls file of {printable(image.path)} holds no whole number"
        ) from error


def _classes(
    images: Sequence[_Member], archives: Sequence[Path], parts: bool, label_key: str | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and names of the classes that folders and archives stand for.

    Raises:
        UserError: archives may be classes, or parts of a set without.
    """
    together = len({archive.parent for archive in archives}) == 1
    if label_key == ARCHIVE or (label_key is None and not (parts and together)):
        return _classes_by_folder([image.folders for image in images])
    labels, class_names = _classes_by_folder([image.folders[1:] for image in images])
    if not class_names and label_key is None:
        first, last = (printable(archive.name) for archive in (archives[0], archives[-1]))
        raise UserError(
            f"{first} to {last} may be classes, or parts of a set without classes: say which by --label-key "
            f"{ARCHIVE} or --label-key {NONE}"
        )
    return labels, class_names


def _are_numbered(archives: Sequence[Path]) -> bool:
    """Whether the names of archives differ in one number, which counts them."""
    split = [re.split(r"(\d+)", archive.stem) for archive in archives]
    if len({len(words) for words in split}) > 1:
        return False
    differing = [words for words in zip(*split, strict=True) if len(set(words)) > 1]
    if len(differing) != 1 or not all(word.isdecimal() for word in differing[0]):
        return False
    numbers = sorted(map(int, differing[0]))
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _classes_by_folder(
    folders: Sequence[tuple[str, ...]],
) -> tuple[np.ndarray, tuple[str, ...]]:
    # Where the paths first differ: between the smallest and the largest, in their order.
    first, last = (edge(folders, default=()) for edge in (min, max))
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))))
    tops = [path[common] if len(path) > common else "" for path in folders]
    class_names = sorted(set(tops))
    number: Mapping[str, int] = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number[top] for top in tops], np.int32)
    return labels, tuple(map(printable, class_names)) if len(class_names) > 1 else ()


def _members(archive: Path, top: Path, left_out: Counter[str], skip: bool) -> Iterator[_Member]:
    folders = (*archive.parent.relative_to(top).parts, archive.stem)
    try:
        with tarfile.open(archive, "r:") as tar:
            yield from _walk(archive, tar, folders, 0, left_out, skip)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{printable(str(archive))} cannot be read as an uncompressed tar file: {error}; unpack "
            "it, or write it again without compression"
        ) from error


def _walk(
    archive: Path,
    tar: tarfile.TarFile,
    folders: tuple[str, ...],
    start: int,
    left_out: Counter[str],
    skip: bool,
) -> Iterator[_Member]:
    if len(folders) > 4096 or start < 0:
        raise tarfile.ReadError("its folders are nested too deep")
    for info in tar:
        path = PurePosixPath(info.name)
        if info.isdir():
            continue
        if not info.isreg():
            left_out["links and devices"] += 1
            continue
        if any(map(ignored, path.parts)):
            left_out["hidden or of the system"] += 1
            continue
        inside = (*folders, *path.parent.parts)
        if path.suffix == ".tar":
            if len(folders) > DEEPEST:
                raise tarfile.ReadError(f"archives are nested more than {DEEPEST} deep")
            with tarfile.open(fileobj=tar.extractfile(info), mode="r:") as inner:
                within = (*inside, path.stem)
                yield from _walk(archive, inner, within, start + info.offset_data, left_out, skip)
        else:
            yield _Member(archive, inside, path.name, start + info.offset_data, info.size)
    if not _has_end(tar):
        if not skip:
            raise tarfile.ReadError(
                f"{'/'.join(folders)} is damaged or cut off after {len(tar.getmembers()):,} members, which "
                "alone are taken with --skip-unreadable"
            )
        left_out["archives that are damaged or cut off"] += 1


def _has_end(tar: tarfile.TarFile) -> bool:
    """Whether an archive that has been read ends in a block of zeros.

    tarfile also stops, and says nothing, where the file is cut between members or a header is damaged.
    """
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)

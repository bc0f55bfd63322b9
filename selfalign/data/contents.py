"""Of which files a data set was made, so that a run can tell later what has changed.

A run's order is a function of the number of its images. It therefore goes on with the places that its
images had when it began, also when some of them are gone: see `open_data`.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.names import encode_name, printable
from selfalign.records import parse_json
from selfalign.weights import listed

ABSENT = -1
"""The size of a file that is gone."""
MAX_BYTES = 2**28
"""Of the unpacked record: four times what ImageNet takes."""
SHOWN = 5


class Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The image files of a folder, in the order in which they were found."""

    class_names: tuple[str, ...]
    """By label, as `DataSource` has them."""
    names: tuple[str, ...]
    """Relative to the folder."""
    labels: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    sizes: tuple[Annotated[int, msgspec.Meta(ge=ABSENT)], ...]
    """Bytes of each file; ABSENT for one that is gone."""

    def __post_init__(self) -> None:
        classes = max(1, len(self.class_names))
        if not len(self.names) == len(self.labels) == len(self.sizes) >= 2:
            raise ValueError("allowed are as many names as labels and sizes, and at least 2")
        if len(set(self.names)) < len(self.names) or max(self.labels) >= classes:
            raise ValueError("a name is there twice, or a label has no class")

    def digest(self, order: Sequence[int], settings: str) -> str:
        """A fingerprint of the files and of settings of how they are read."""
        return fingerprint_files(
            (self.names[index] for index in order),
            (self.labels[index] for index in order),
            (self.sizes[index] for index in order),
            settings,
        )


def fingerprint_files(
    names: Iterable[str], labels: Iterable[int], sizes: Iterable[int], settings: str = ""
) -> str:
    """A fingerprint of files in their order: of names, labels and sizes, and of settings."""
    digest = hashlib.sha256(settings.encode())
    for name, label, size in zip(names, labels, sizes, strict=True):
        digest.update(encode_name(f"{name}\0{label}\0{size}\n"))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Recorded:
    """What a run recorded of its data when it began."""

    fingerprint: str
    """`DataSource.fingerprint`."""
    contents: Contents | None = None
    """`DataSource.contents`; None where the run has kept none."""


def describe_changes(old: Contents, new: Contents) -> str:
    """What has changed, in one line; empty if nothing has.

    Args:
        old: of which files the set was made.
        new: of which it is made now; opened with or without `old`.
    """
    before = dict(zip(old.names, old.sizes, strict=True))
    after = dict(zip(new.names, new.sizes, strict=True))
    gone = [name for name, size in before.items() if size != after.get(name, ABSENT) == ABSENT]
    added = [name for name, size in after.items() if before.get(name, ABSENT) == ABSENT != size]
    changed = [
        name
        for name, size in before.items()
        if size != after.get(name, ABSENT) and ABSENT not in (size, after.get(name, ABSENT))
    ]
    kinds = {"gone": gone, "new": added, "of another size": changed}
    said = [
        f"{printable(listed(names, SHOWN))} {'is' if len(names) == 1 else 'are'} {what}"
        for what, names in kinds.items()
        if names
    ]
    if old.class_names != new.class_names:
        said.append(
            f"{len(new.class_names)} classes instead of {len(old.class_names)}, or other names"
        )
    return "; ".join(said)


def write_contents(path: Path, contents: Contents) -> None:
    """Write a record as gzipped JSON, whole or not at all.

    Raises:
        UserError: the disk is full or not writable.
    """
    packed = gzip.compress(json.dumps(msgspec.to_builtins(contents)).encode(), 5, mtime=0)
    write_whole(path, lambda partial: partial.write_bytes(packed))


def read_contents(path: Path) -> Contents:
    """The record that `write_contents` wrote.

    Raises:
        UserError: it cannot be read; the message names the file and the field.
    """
    if not path.is_file():
        raise UserError(f"{path} cannot be read: there is no such file")
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it holds more than {MAX_BYTES:,} bytes")
        return msgspec.convert(parse_json(content), Contents)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error

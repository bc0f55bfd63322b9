"""The format on disk: raw shards, an index, a manifest, and how each file comes to be whole.

A stored set is a folder:

    manifest.json       what is stored; written last, so a set that has one is complete
    index.npy           (M, 2) int32: each image's label, and 1 if it is held out
    shard-00000.bin …   records in C order, without a header
    autoencoder/        a copy of the VAE, so that the set can be decoded anywhere

A record is one image: `views` × channels × height × width numbers. Of latents the channels are the
posterior's means, then its standard deviations; a second view is the mirrored image.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from selfalign.data.folder import printable
from selfalign.disk import publish
from selfalign.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
AUTOENCODER = "autoencoder"
PARTIAL_SUFFIX = ".part"

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


@dataclass(frozen=True)
class Layout:
    """What a set holds and how it was made, known before the first image is encoded."""

    kind: str
    """`moments` of a VAE's posterior, or `pixels`."""
    image_size: int
    """Side of the images, in pixels."""
    dtype: str
    """numpy's name of the stored numbers."""
    shape: tuple[int, int, int, int]
    """One record: views, channels, height, width."""
    scale: float
    """The model sees latents · scale + shift."""
    shift: float
    autoencoder: str
    """Name or folder of the VAE; empty for pixels."""
    autoencoder_sha256: str
    """Hash of the VAE's weights; empty for pixels, and where they were not at hand."""
    class_names: tuple[str, ...]
    source: str
    """What the set was made from, as it was given."""
    fingerprint: str
    """Changes when the source does."""
    images: int
    """Images of the source."""
    shard_images: int
    """Images of the source per shard."""

    @property
    def record_bytes(self) -> int:
        """Size of one record."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    file: str
    records: int
    sha256: str
    skipped: tuple[int, ...] = ()
    """Positions in the source of unreadable images that were left out."""


@dataclass(frozen=True)
class Manifest:
    """A finished set."""

    layout: Layout
    shards: tuple[Shard, ...]
    index_sha256: str
    skipped: tuple[str, ...]
    """Names of the images that were left out as unreadable."""
    format: int = FORMAT


def layout_from_dict(values: dict[str, Any]) -> Layout:
    """The layout that `dataclasses.asdict` took apart."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Layout(**fields)


def shard_from_dict(values: dict[str, Any]) -> Shard:
    """The shard that `dataclasses.asdict` took apart."""
    return Shard(**{**values, "skipped": tuple(values["skipped"])})


def read_manifest(root: Path) -> Manifest:
    """The manifest of a finished set.

    Raises:
        UserError: there is none, or this version cannot read it.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{str(root)!r} holds no prepared data set ({MANIFEST} is missing): make or finish it "
            "with `selfalign prepare SOURCE OUT`"
        )
    values = read_json(path)
    try:
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} has format {values['format']}: this version reads format {FORMAT}"
            )
        return Manifest(
            layout=layout_from_dict(values["layout"]),
            shards=tuple(shard_from_dict(shard) for shard in values["shards"]),
            index_sha256=values["index_sha256"],
            skipped=tuple(values["skipped"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read; the message names it.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into a UserError about `folder`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}; what is finished there "
            "is kept, and the same command continues it"
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name only when it is complete and on the disk."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as file:
            yield file
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass as a JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(dataclasses.asdict(value), indent=1).encode())


def file_sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sizes(root: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with the shards, by file, as far as their sizes tell."""
    problems = {}
    for shard in manifest.shards:
        path = root / shard.file
        expected = shard.records * manifest.layout.record_bytes
        if not path.is_file():
            problems[shard.file] = "is missing"
        elif (size := path.stat().st_size) != expected:
            wrong = "is truncated" if size < expected else "is too long"
            problems[shard.file] = f"{wrong}: it holds {size:,} bytes instead of {expected:,}"
    return problems


def verify(root: Path, progress: Progress = lambda done, total: None) -> dict[str, str]:
    """Read everything that is stored, and compare it with the manifest.

    Args:
        root: a finished set.
        progress: called with bytes read and bytes in all.

    Returns:
        What is wrong, by file; empty for an intact set.

    Raises:
        UserError: there is no readable manifest.
    """
    from selfalign.data.latents.autoencoder import stored_weights_sha256

    manifest = read_manifest(root)
    problems = check_sizes(root, manifest)
    checksums = {INDEX: manifest.index_sha256}
    checksums |= {shard.file: shard.sha256 for shard in manifest.shards}
    total = sum(shard.records for shard in manifest.shards) * manifest.layout.record_bytes
    done = 0
    for file, expected in checksums.items():
        if file in problems:
            continue
        try:
            if file_sha256(root / file) != expected:
                problems[file] = "is damaged: its checksum differs from the manifest's"
            done += (root / file).stat().st_size
        except OSError as error:
            problems[file] = f"cannot be read: {printable(error.strerror or str(error))}"
        progress(min(done, total), total)
    if manifest.layout.autoencoder_sha256:
        try:
            actual = stored_weights_sha256(root / AUTOENCODER)
            if actual != manifest.layout.autoencoder_sha256:
                problems[AUTOENCODER] = "is damaged: its weights differ from the manifest's"
        except UserError as error:
            problems[AUTOENCODER] = str(error)
    return problems

"""The format on disk: raw shards with checksums, an index, a manifest.

A stored set is a folder:

    manifest.json        what is stored; written last, so a set that has one is complete
    index.npy            (M, 2) int32: each image's label, and 1 if it is held out
    shard-00000.bin …    records in C order, without a header
    shard-00000.xxh3 …   (records, views) uint64, little-endian: XXH3 of each view of each record
    autoencoder/         a copy of the VAE, so that the set can be decoded anywhere
    features/WORD/       what an encoder makes of the images: a set of its own without an index, whose
                         manifest names the encoder and the fingerprint of the images

A record is one image: `views` × channels × height × width numbers. Of latents the channels are the
posterior's means, then its standard deviations; of features it is rows × columns × features. A second view
is the mirrored image. Sets that version 0.1.0 wrote have no checksums of records.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from selfalign.encoders import parse_word
from selfalign.errors import UserError
from selfalign.records import read_json

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
AUTOENCODER = "autoencoder"
FEATURES = "features"
CHECKSUM_BYTES = 8
LARGEST_CLASSES = 10**6

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""
Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
Side = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a set holds and how it was made, known before the first image is encoded."""

    kind: Literal["moments", "pixels", "features"]
    """`moments` of a VAE's posterior, `pixels`, or an encoder's `features`."""
    image_size: Side
    """Side of the images, in pixels."""
    dtype: Literal["uint8", "float16", "float32"]
    """numpy's name of the stored numbers."""
    shape: tuple[Annotated[int, msgspec.Meta(ge=1, le=2)], Side, Side, Side]
    """One record: views, channels, height, width; of features views, rows, columns, features."""
    scale: float | tuple[float, ...]
    """The model sees latents · scale + shift: numbers, or one per channel."""
    shift: float | tuple[float, ...]
    autoencoder: str
    """Name or folder of the VAE; empty for pixels."""
    autoencoder_sha256: Sha256
    """Hash of the VAE's weights; empty for pixels, and where they were not at hand."""
    class_names: Annotated[tuple[str, ...], msgspec.Meta(max_length=LARGEST_CLASSES)]
    source: str
    """What the set was made from, as it was given."""
    fingerprint: str
    """Changes when the source does; of features it is that of the set of images."""
    images: Count
    """Images of the source."""
    shard_images: Annotated[int, msgspec.Meta(ge=1, le=10**12)]
    """Images of the source per shard."""
    normalise: Literal["config", "measured"] = "config"
    """Whether scale and shift are those of the autoencoder, or follow from what the manifest measured."""
    background: str | None = None
    """Behind what is transparent; None in sets of version 0.1.0, which dropped it."""
    encoder: str = ""
    """Word of the encoder (`selfalign.encoders`); of features."""
    encoder_sha256: Sha256 = ""
    """Hash of the encoder; of features."""

    def __post_init__(self) -> None:
        views, channels, height, width = self.shape
        if self.kind == "pixels":
            fits = (self.dtype, views, channels) == ("uint8", 1, 3)
        elif self.kind == "features":
            fits = self.dtype != "uint8" and bool(self.encoder) and bool(self.encoder_sha256)
        else:
            fits = self.dtype != "uint8" and channels % 2 == 0
        square = self.kind == "features" or height == width <= self.image_size
        if not fits or self.record_bytes > 2**32 or not square:
            raise ValueError(f"{self.kind} of {self.dtype} cannot have the shape {self.shape}")
        scales, shifts = (n if isinstance(n, tuple) else (n,) for n in (self.scale, self.shift))
        if any(len(numbers) not in (1, channels // 2) for numbers in (scales, shifts)):
            raise ValueError(f"scale and shift: allowed are one number, or {channels // 2}")
        if not all(map(math.isfinite, (*scales, *shifts))) or not all(scales):
            raise ValueError(
                "scale and shift: allowed are finite numbers, and a scale other than 0"
            )

    @property
    def record_bytes(self) -> int:
        """Size of one record."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished shard."""

    file: Annotated[str, msgspec.Meta(pattern=r"^shard-[0-9]{5,12}\.bin$")]
    records: Count
    sha256: Sha256
    skipped: tuple[Count, ...] = ()
    """Positions in the source of unreadable images that were left out."""

    @property
    def checksums(self) -> str:
        """The file beside it."""
        return self.file.removesuffix(".bin") + ".xxh3"


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished set."""

    layout: Layout
    shards: Annotated[tuple[Shard, ...], msgspec.Meta(min_length=1)]
    index_sha256: Sha256
    skipped: tuple[str, ...]
    """Names of the images that were left out as unreadable."""
    left_out: dict[str, Count] = {}
    """Other files or rows of the source that are not part of the set, by what they are."""
    record_checksums: Literal["xxh3_64"] | None = None
    """What the files beside the shards hold; None where there are none."""
    format: int = FORMAT
    channel_mean: tuple[float, ...] = ()
    """Of the training images' latents, where it was measured."""
    channel_std: tuple[float, ...] = ()
    """Their deviation, what is drawn from the posteriors included."""

    def __post_init__(self) -> None:
        if self.layout.kind == "features" and self.record_checksums is None:
            raise ValueError("record_checksums: features have them, of whatever version")
        if self.layout.normalise == "measured":
            channels = self.layout.shape[1] // 2
            measured = (*self.channel_mean, *self.channel_std)
            whole = len(self.channel_mean) == len(self.channel_std) == channels
            if not whole or not all(map(math.isfinite, measured)) or min(self.channel_std) <= 0:
                raise ValueError(
                    f"channel_mean and channel_std: allowed are {channels} numbers each, deviations above 0"
                )

    @property
    def scale(self) -> float | tuple[float, ...]:
        """The model sees latents · scale + shift."""
        if self.layout.normalise == "config":
            return self.layout.scale
        return tuple(1 / std for std in self.channel_std)

    @property
    def shift(self) -> float | tuple[float, ...]:
        """See `scale`."""
        if self.layout.normalise == "config":
            return self.layout.shift
        return tuple(-m / s for m, s in zip(self.channel_mean, self.channel_std, strict=True))

    @property
    def has_checksums(self) -> bool:
        """Whether there are checksums of records beside the shards."""
        return self.record_checksums is not None

    @property
    def records(self) -> int:
        """Images in the set."""
        return sum(shard.records for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Of what is stored: changes when a number does."""
        sums = "".join((self.index_sha256, *(shard.sha256 for shard in self.shards)))
        return hashlib.sha256(sums.encode()).hexdigest()[:16]


class _Format(msgspec.Struct):
    format: int


def read_manifest(root: Path) -> Manifest:
    """The manifest of a finished set.

    Raises:
        UserError: there is none, or this version cannot read it.
    """
    path = root / MANIFEST
    if not path.exists():
        raise UserError(
            f"{str(root)!r} holds no prepared data set ({MANIFEST} is missing): make or finish it "
            "with `selfalign prepare SOURCE OUT`"
        )
    written = read_json(path, _Format).format
    if written != FORMAT:
        raise UserError(f"{path} has format {written}: this version reads format {FORMAT}")
    return read_json(path, Manifest)


def features_folder(root: Path, word: str) -> Path:
    """Where a set has the features that an encoder makes of its images."""
    return root / FEATURES / parse_word(word).folder


def file_sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sizes(
    root: Path, layout: Layout, shards: Iterable[Shard], checksums: bool
) -> dict[str, str]:
    """What is wrong with shards, by file, as far as their sizes tell.

    Args:
        root: folder of the set.
        layout: what the set holds.
        shards: which.
        checksums: whether there are checksums of records beside them.
    """
    expected = {}
    for shard in shards:
        expected[shard.file] = shard.records * layout.record_bytes
        if checksums:
            expected[shard.checksums] = shard.records * layout.shape[0] * CHECKSUM_BYTES
    problems = {}
    for file, size in expected.items():
        path = root / file
        if not path.is_file():
            problems[file] = "is missing"
        elif (found := path.stat().st_size) != size:
            wrong = "is truncated" if found < size else "is too long"
            problems[file] = f"{wrong}: it holds {found:,} bytes instead of {size:,}"
    return problems

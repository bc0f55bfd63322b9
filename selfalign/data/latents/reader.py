"""A stored set as training reads it."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from selfalign.arrays import read_npy
from selfalign.data.latents.autoencoder import Decoder, per_channel
from selfalign.data.latents.store import (
    AUTOENCODER,
    INDEX,
    Manifest,
    check_sizes,
    file_sha256,
    read_manifest,
)
from selfalign.data.source import DataSource
from selfalign.errors import UserError
from selfalign.sections import DataConfig

CHECKED_RECORDS = 4_096
"""Sets of at most so many images are checked when they are opened: damage is found before work begins."""
CHECKED_AT_ONCE = 256


class Records:
    """Reads records of the shards, by their position in the set, and compares each with its checksum.

    By `pread` and not through a memory map: pages of a map count as this process's memory, which
    would grow with the share of the set that it has seen.

    Args:
        root: folder of the set.
        manifest: what is stored there.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.layout = root, manifest.layout
        self.shards = manifest.shards
        self.scale_and_shift = manifest.scale, manifest.shift
        self.fingerprint = manifest.fingerprint
        self.has_checksums = manifest.has_checksums
        self.ends = np.cumsum([shard.records for shard in manifest.shards])
        self._files: dict[int, BinaryIO] = {}
        self._checksums: dict[int, memoryview] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Each worker opens its own files.
        return {**self.__dict__, "_files": {}, "_checksums": {}}

    def read(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Views of records, as stored (B, channels, height, width).

        Raises:
            UserError: a shard cannot be read, or is damaged.
        """
        batch = torch.empty(
            (len(indices), *self.layout.shape[1:]), dtype=getattr(torch, self.layout.dtype)
        )
        rows = batch.view(len(indices), -1).numpy().view(np.uint8)
        size = self.layout.record_bytes // self.layout.shape[0]
        shards = np.searchsorted(self.ends, indices, side="right")
        firsts = np.concatenate([[0], self.ends])[shards]
        # Views of a record follow each other, as records do.
        numbers = (np.asarray(indices) - firsts) * self.layout.shape[0] + np.asarray(views)
        offsets = (numbers * size).tolist()
        places = zip(map(self._file, shards.tolist()), offsets, rows, strict=True)
        waiting = [place for place in places if not _read_cached(*place)]
        for file, offset, _ in waiting:
            # All reads of a batch are announced before the first waits for the disk.
            _advise(file, offset, size, "POSIX_FADV_WILLNEED")
        for file, offset, row in waiting:
            try:
                complete = os.preadv(file.fileno(), [row.data], offset) == size
            except OSError as error:
                raise UserError(f"{file.name} cannot be read: {error.strerror}") from error
            if not complete:
                raise UserError(
                    f"{file.name} ends early: `selfalign prepare --verify {self.root}` tells "
                    "what is damaged"
                )
        if self.has_checksums:
            checksum, expected = xxhash.xxh3_64_intdigest, self._checksums
            for shard, number, row in zip(shards.tolist(), numbers.tolist(), rows, strict=True):
                if checksum(row) != expected[shard][number]:
                    raise UserError(
                        f"{self.root / self.shards[shard].file} is damaged: `selfalign prepare "
                        f"--verify {self.root}` tells what else is"
                    )
        return batch

    def _file(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            path = self.root / self.shards[shard].file
            try:
                if self.has_checksums:
                    sums = np.fromfile(self.root / self.shards[shard].checksums, "<u8")
                    # Plain numbers come out of a memory view faster than out of an array.
                    self._checksums[shard] = sums.astype(np.uint64).data
                file = path.open("rb", buffering=0)
            except OSError as error:
                raise UserError(f"{path} cannot be opened: {error.strerror}") from error
            _advise(file, 0, 0, "POSIX_FADV_RANDOM")
            self._files[shard] = file
        return self._files[shard]


def _read_cached(file: BinaryIO, offset: int, row: np.ndarray) -> bool:
    """Read what the page cache holds, in one call and without waiting; False if it does not hold all."""
    if not hasattr(os, "RWF_NOWAIT"):  # Linux has it
        return False
    try:
        return os.preadv(file.fileno(), [row.data], offset, os.RWF_NOWAIT) == row.nbytes
    except OSError:  # not in the cache, or a file system that cannot tell
        return False


def _advise(file: BinaryIO, offset: int, length: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):  # macOS has no such call; reading works without
        os.posix_fadvise(file.fileno(), offset, length, getattr(os, advice))


@dataclass(frozen=True)
class StoredSplit:
    """One split of a stored set."""

    reads_in_threads: ClassVar[bool] = True
    records: Records
    positions: np.ndarray
    """Of this split's images in the set."""
    labels: Tensor
    flip: bool = False
    """Mirror half of the images, by their seeds."""

    def __len__(self) -> int:
        return len(self.positions)

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Split.read`. Latents are drawn from their posteriors; without seeds, its means."""
        layout = self.records.layout
        mirrored = [self.flip and seed & 1 for seed in seeds or [0] * len(indices)]
        chosen = self.positions[np.asarray(indices)]
        labels = self.labels[torch.as_tensor(indices)]
        if layout.kind == "pixels":
            images = self.records.read(chosen, [0] * len(indices)).float() / 127.5 - 1
            mask = torch.tensor(mirrored, dtype=torch.bool)[:, None, None, None]
            return torch.where(mask, images.flip(-1), images), labels
        mean, std = self.records.read(chosen, mirrored).chunk(2, dim=1)
        latents = torch.empty(mean.shape)
        if seeds is None:
            latents.copy_(mean)
        else:
            # In place: fresh memory for every step costs more than the arithmetic.
            generator = torch.Generator()
            for sample, seed in zip(latents, seeds, strict=True):
                sample.normal_(generator=generator.manual_seed(seed))
            latents.mul_(std).add_(mean)
        scale, shift = (per_channel(each, latents) for each in self.records.scale_and_shift)
        return latents.mul_(scale).add_(shift), labels


@dataclass(frozen=True)
class StoredFeatures:
    """What an encoder made of the images of a split, as a `Features`.

    Attributes:
        records: of the features.
        positions: of the split's images among them.
        flip: whether half of the images are mirrored, by their seeds, as the split has it.
    """

    records: Records
    positions: np.ndarray
    flip: bool = False

    @property
    def encoder_sha256(self) -> str:
        """See `Features.encoder_sha256`."""
        return self.records.layout.encoder_sha256

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Features.shape`."""
        return self.records.layout.shape[1:]

    def read(self, indices: Sequence[int], seeds: Sequence[int] | None = None) -> Tensor:
        """See `Features.read`."""
        mirrored = [self.flip and seed & 1 for seed in seeds or [0] * len(indices)]
        return self.records.read(self.positions[np.asarray(indices)], mirrored)


def open_features(
    folder: Path, word: str, positions: np.ndarray, flip: bool, of: str
) -> StoredFeatures:
    """Features that are stored in a folder.

    Args:
        folder: of the features.
        word: of the encoder.
        positions: which of its records are the split's images.
        flip: whether images are mirrored in training.
        of: fingerprint of the set of images.

    Raises:
        UserError: they are missing, unfinished or damaged, of other images, by another encoder, or without
            mirrored copies.
    """
    manifest = read_manifest(folder)
    layout = manifest.layout
    if layout.kind != "features":
        raise UserError(f"{folder} holds {layout.kind}: features were expected")
    if layout.encoder != word:
        raise UserError(
            f"{folder} holds features of {layout.encoder!r}: those of {word!r} were expected"
        )
    if layout.fingerprint != of:
        raise UserError(
            f"the features in {folder} were made of other images (fingerprint {layout.fingerprint} instead "
            f"of {of}): remove that folder and run `selfalign prepare` again with --encoder {layout.encoder}"
        )
    if len(positions) and positions.max() >= manifest.records:
        raise UserError(
            f"{folder} holds features of {manifest.records:,} images, and number {positions.max():,} is "
            "asked for: remove that folder, and run `selfalign prepare` again"
        )
    for file, problem in check_sizes(folder, layout, manifest.shards, True).items():
        raise UserError(f"{folder / file} {problem}")
    if flip and layout.shape[0] == 1:
        raise UserError(
            f"data.flip is True, but the features in {folder} were made without mirrored copies: allowed is "
            "False, or make them again with --flip"
        )
    return StoredFeatures(Records(folder, manifest), positions, flip)


def open_latents(config: DataConfig) -> DataSource:
    """Open the stored set in `config.root`.

    Raises:
        UserError: the set is missing, unfinished or damaged, or holds no mirrored images to flip.
    """
    root = Path(config.root)
    manifest = read_manifest(root)
    layout = manifest.layout
    if not manifest.records:
        raise UserError(f"{str(root)!r} holds no images")
    problems = check_sizes(root, layout, manifest.shards, manifest.has_checksums)
    for file, problem in problems.items():
        raise UserError(f"{root / file} {problem}")
    if config.flip and layout.kind == "moments" and layout.shape[0] == 1:
        raise UserError(
            f"data.flip is True, but {str(root)!r} was prepared without mirrored copies: allowed is "
            "False, or prepare it again with --flip"
        )
    index = _read_index(root, manifest)
    if manifest.records <= CHECKED_RECORDS:
        _read_all(Records(root, manifest), manifest.records)
    records = Records(root, manifest)
    train, heldout = (
        StoredSplit(
            records,
            positions := np.flatnonzero(index[:, 1] == part),
            torch.from_numpy(index[positions, 0].astype(np.int64)),
            flip,
        )
        for part, flip in ((0, config.flip), (1, False))
    )
    _, channels, height, width = layout.shape
    shape = (channels if layout.kind == "pixels" else channels // 2, (height, width))
    left_out = dict(manifest.left_out)
    if manifest.skipped:
        left_out["unreadable"] = left_out.get("unreadable", 0) + len(manifest.skipped)
    source = DataSource(
        train,
        heldout,
        *shape,
        layout.class_names,
        manifest.fingerprint,
        left_out=left_out,
    )
    if layout.kind == "pixels":
        return source
    decoder = Decoder(
        root / AUTOENCODER,
        layout.autoencoder,
        layout.autoencoder_sha256,
        manifest.scale,
        manifest.shift,
    )
    return dataclasses.replace(source, decode=decoder)


def _read_all(records: Records, count: int) -> None:
    for first in range(0, count, CHECKED_AT_ONCE):
        checked = range(first, min(first + CHECKED_AT_ONCE, count))
        for view in range(records.layout.shape[0]):
            records.read(checked, [view] * len(checked))


def _read_index(root: Path, manifest: Manifest) -> np.ndarray:
    path = root / INDEX
    index = read_npy(path)
    if index.shape != (manifest.records, 2) or index.dtype != np.int32:
        raise UserError(
            f"{path} is damaged: it is {index.dtype} of shape {index.shape} instead of int32 of shape "
            f"{(manifest.records, 2)}"
        )
    if file_sha256(path) != manifest.index_sha256:
        raise UserError(f"{path} is damaged: its checksum differs from the manifest's")
    classes = max(1, len(manifest.layout.class_names))
    labels, heldout = index[:, 0], index[:, 1]
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{path} has labels from {labels.min()} to {labels.max()}: allowed are 0 to {classes - 1}, "
            "the classes of the manifest"
        )
    if heldout.min() < 0 or heldout.max() > 1:
        raise UserError(f"{path} is damaged: in its second column allowed are 0 and 1")
    return index

"""A stored set as training reads it."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from selfalign.config import DataConfig
from selfalign.data.datasets import DataSource
from selfalign.data.latents.autoencoder import Decoder
from selfalign.data.latents.store import AUTOENCODER, INDEX, Manifest, check_sizes, read_manifest
from selfalign.errors import UserError


class Records:
    """Reads records of the shards, by their position in the set.

    By `pread` and not through a memory map: pages of a map count as this process's memory, which
    would grow with the share of the set that it has seen.

    Args:
        root: folder of the set.
        manifest: what is stored there.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.layout = root, manifest.layout
        self.names = [shard.file for shard in manifest.shards]
        self.ends = np.cumsum([shard.records for shard in manifest.shards])
        self._files: dict[int, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Each worker opens its own files.
        return {**self.__dict__, "_files": {}}

    def read(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Views of records, as stored (B, channels, height, width).

        Raises:
            UserError: a shard cannot be read, or has become shorter.
        """
        batch = torch.empty(
            (len(indices), *self.layout.shape[1:]), dtype=getattr(torch, self.layout.dtype)
        )
        rows = batch.view(len(indices), -1).numpy().view(np.uint8)
        size = self.layout.record_bytes // self.layout.shape[0]
        shards = np.searchsorted(self.ends, indices, side="right")
        firsts = np.concatenate([[0], self.ends])[shards]
        offsets = (np.asarray(indices) - firsts) * self.layout.record_bytes + np.asarray(
            views
        ) * size
        places = zip(map(self._file, shards.tolist()), offsets.tolist(), rows, strict=True)
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
        return batch

    def _file(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            path = self.root / self.names[shard]
            try:
                self._files[shard] = file = path.open("rb", buffering=0)
            except OSError as error:
                raise UserError(f"{path} cannot be opened: {error.strerror}") from error
            _advise(file, 0, 0, "POSIX_FADV_RANDOM")
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
        return latents.mul_(layout.scale).add_(layout.shift), labels


def open_latents(config: DataConfig) -> DataSource:
    """Open the stored set in `config.root`.

    Raises:
        UserError: the set is missing, unfinished or damaged, or holds no mirrored images to flip.
    """
    root = Path(config.root)
    manifest = read_manifest(root)
    layout = manifest.layout
    for file, problem in check_sizes(root, manifest).items():
        raise UserError(f"{root / file} {problem}")
    if config.flip and layout.kind == "moments" and layout.shape[0] == 1:
        raise UserError(
            f"data.flip is True, but {str(root)!r} was prepared without mirrored copies: allowed is "
            "False, or prepare it again with --flip"
        )
    index = _read_index(root, sum(shard.records for shard in manifest.shards))
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
    checksums = "".join((manifest.index_sha256, *(shard.sha256 for shard in manifest.shards)))
    source = DataSource(
        train,
        heldout,
        *shape,
        layout.class_names,
        hashlib.sha256(checksums.encode()).hexdigest()[:16],
    )
    if layout.kind == "pixels":
        return source
    decoder = Decoder(
        root / AUTOENCODER,
        layout.autoencoder,
        layout.autoencoder_sha256,
        layout.scale,
        layout.shift,
    )
    return dataclasses.replace(source, decode=decoder)


def _read_index(root: Path, records: int) -> np.ndarray:
    try:
        index = np.load(root / INDEX, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{root / INDEX} cannot be read: {error}") from error
    if index.shape != (records, 2):
        raise UserError(
            f"{root / INDEX} is damaged: its shape is {index.shape} instead of {(records, 2)}"
        )
    return index

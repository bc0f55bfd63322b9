"""Reading latents: shards against one .npy per image; memory; the time to open ImageNet.

    python benchmarks/data.py FOLDER [--workers 0 2]

FOLDER gets about 3.5 GB of files, made once and kept. Pairs of measurements alternate in one process,
so that whatever else the machine does hits both. Prints the tables of benchmarks/data.md.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from selfalign.data.datasets import open_data
from selfalign.data.latents import store
from selfalign.data.latents.reader import Records, StoredSplit
from selfalign.data.source import Split
from selfalign.data.stream import training_batches
from selfalign.records import write_json
from selfalign.sections import DataConfig

SHAPE = (8, 32, 32)
ITEMS = 100_000
BATCH = 256
BATCHES = 24
SKIPPED = 8
"""Batches before the clock starts: workers start, and have read these ahead."""
PAIRS = 7
IMAGENET = 1_281_167


# The two ways to store the same numbers


def write_shards(root: Path, items: int, sparse: bool = False) -> None:
    """A stored set of random moments, in 64 shards as `prepare` cuts them; or of holes."""
    root.mkdir(parents=True)
    per_shard = -(-items // 64)
    shards = []
    hole = xxhash.xxh3_64_intdigest(bytes(2 * int(np.prod(SHAPE))))
    for number, first in enumerate(range(0, items, per_shard)):
        records = min(per_shard, items - first)
        path = root / f"shard-{number:05d}.bin"
        if sparse:
            with path.open("wb") as file:
                file.truncate(records * 2 * int(np.prod(SHAPE)))
            sums = [hole] * records
        else:
            stored = moments(number, records)
            stored.tofile(path)
            sums = [xxhash.xxh3_64_intdigest(record.tobytes()) for record in stored]
        shards.append(store.Shard(path.name, records, "0" * 64))
        np.array(sums, "<u8").tofile(root / shards[-1].checksums)
    index = np.zeros((items, 2), np.int32)
    index[::100, 1] = 1
    np.save(root / store.INDEX, index)
    layout = store.Layout(
        kind="moments",
        image_size=256,
        dtype="float16",
        shape=(1, *SHAPE),
        scale=0.18215,
        shift=0.0,
        autoencoder="ema",
        autoencoder_sha256="",
        class_names=("all",),
        source="benchmark",
        fingerprint="",
        images=items,
        shard_images=per_shard,
    )
    digest = store.file_sha256(root / store.INDEX)
    manifest = store.Manifest(layout, tuple(shards), digest, (), {}, "xxh3_64")
    write_json(root / store.MANIFEST, manifest)


def moments(seed: int, items: int) -> np.ndarray:
    """Random numbers, as costly to read as real ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((items, *SHAPE), generator=generator).abs().half().numpy()


def npy_path(root: Path, index: int) -> Path:
    """Where EDM2's tool would put this item."""
    return root / f"{index // 1000:05d}" / f"img-mean-std-{index:08d}.npy"


def write_files(root: Path, shards: Path) -> None:
    """The same items, one file each."""
    records = np.concatenate([np.fromfile(p, np.float16) for p in sorted(shards.glob("*.bin"))])
    for index, item in enumerate(records.reshape(-1, *SHAPE)):
        path = npy_path(root, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, item)


@dataclasses.dataclass(frozen=True)
class FileMoments:
    """One .npy per image, as the released data loaders read them."""

    reads_in_threads: ClassVar[bool] = False
    root: Path
    size: int

    def __len__(self) -> int:
        return self.size

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Stored moments."""
        items = [torch.from_numpy(np.load(npy_path(self.root, index))) for index in indices]
        return torch.stack(items), torch.zeros(len(indices), dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class ShardMoments:
    """The same from shards."""

    reads_in_threads: ClassVar[bool] = True
    records: Records
    size: int

    def __len__(self) -> int:
        return self.size

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Stored moments."""
        stored = self.records.read(np.asarray(indices), [0] * len(indices))
        return stored, torch.zeros(len(indices), dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class SampledFiles:
    """Moments from files, sampled with one draw per batch, as the released training loops do."""

    reads_in_threads: ClassVar[bool] = False
    files: FileMoments

    def __len__(self) -> int:
        return len(self.files)

    def read(
        self, indices: Sequence[int], seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latents."""
        stored, labels = self.files.read(indices)
        mean, std = stored.float().chunk(2, dim=1)
        return (mean + std * torch.randn_like(mean)) * 0.18215, labels


# Measurements


def forget(folder: Path, pattern: str) -> None:
    """Drop files from the page cache."""
    for path in folder.rglob(pattern):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def images_per_second(split: Split, workers: int, seed: int) -> float:
    """Throughput of random batches through the loader that training uses."""
    batches = training_batches(
        split, seed=seed, batch_size=BATCH, first=0, last=BATCHES + SKIPPED, workers=workers
    )
    for _ in range(SKIPPED):
        next(batches)
    begun = time.perf_counter()
    for _ in batches:
        pass
    return BATCHES * BATCH / (time.perf_counter() - begun)


def compare(
    names: tuple[str, str],
    splits: tuple[Split, Split],
    workers: int,
    drop: Callable[[], None] | None,
) -> str:
    """A row of the table: medians over alternating pairs, and the median of their ratios."""
    pairs = []
    for number in range(-1, PAIRS):
        pair = []
        for split in splits:
            if drop is not None:
                drop()
            pair.append(images_per_second(split, workers, seed=number if drop else 0))
        if number >= 0:  # the first pair warms up
            pairs.append(pair)
    files, shards = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    return (
        f"| {names[0]} | {names[1]} | {workers} | {files:,.0f} | {shards:,.0f} | "
        f"{statistics.median(ratios):.1f} × ({ratios[0]:.1f} to {ratios[-1]:.1f}) |"
    )


def memory(root: Path, batches: int) -> dict[str, float]:
    """Resident memory, in MB, before and after reading random batches in this process."""
    source = open_data(DataConfig(name="latents", root=str(root)))
    random = np.random.default_rng(0)

    def resident() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def read(count: int) -> None:
        for _ in range(count):
            source.train.read(random.integers(0, len(source.train), BATCH).tolist(), range(BATCH))

    read(4)
    before = resident()
    read(batches)
    return {"images": len(source.train), "before": before, "after": resident()}


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    torch.set_num_threads(1)
    if arguments.memory:
        print(memory(folder, arguments.memory))
        return
    shards, files, imagenet = folder / "shards", folder / "files", folder / "imagenet"
    small = folder / "small"
    for root, items, sparse in ((shards, ITEMS, False), (small, 5_000, False)):
        if not (root / store.MANIFEST).exists():
            write_shards(root, items, sparse)
    if not (imagenet / store.MANIFEST).exists():
        write_shards(imagenet, IMAGENET, sparse=True)
    if not npy_path(files, ITEMS - 1).exists():
        write_files(files, shards)
    os.sync()  # only written pages can be dropped

    source = open_data(DataConfig(name="latents", root=str(shards)))
    assert isinstance(source.train, StoredSplit)
    whole = ShardMoments(source.train.records, ITEMS)
    single = FileMoments(files, ITEMS)
    assert torch.equal(whole.read(range(0, ITEMS, 997))[0], single.read(range(0, ITEMS, 997))[0])

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch", end=" ")
    print(
        f"{torch.__version__}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}\n"
    )
    print("| what | cache | workers | files/s | shards/s | ratio (range) |")
    print("| --- | --- | --- | --- | --- | --- |")

    def drop() -> None:
        forget(files, "*.npy")
        forget(shards, "*.bin")

    for workers in arguments.workers:
        for cache in ("warm", "cold"):
            cold = drop if cache == "cold" else None
            print(compare(("moments", cache), (single, whole), workers, cold), flush=True)
    for workers in arguments.workers:
        sampled = (SampledFiles(single), source.train)
        print(compare(("sampled latents", "warm"), sampled, workers, None), flush=True)

    print()
    for root in (small, shards, imagenet):
        command = [sys.executable, __file__, str(root), "--memory", "400"]
        print(root.name, subprocess.run(command, capture_output=True, text=True).stdout.strip())
    times = []
    for _ in range(PAIRS):
        begun = time.perf_counter()
        open_data(DataConfig(name="latents", root=str(imagenet)))
        times.append(time.perf_counter() - begun)
    print(f"opening {IMAGENET:,} items: median {statistics.median(times):.3f} s")


if __name__ == "__main__":
    main()

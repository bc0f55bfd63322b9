"""The work of preparing, shard by shard: in this process, or in several that share it."""

import concurrent.futures
import hashlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from selfalign.data.images import UnreadableImageError, decode_image
from selfalign.data.latents import autoencoder as vae
from selfalign.data.latents.moments import read_moments
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources import Source
from selfalign.data.latents.store import AUTOENCODER, Layout, Progress, Shard, check_sizes
from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.parts import load_plugin, loaded_plugins
from selfalign.records import read_json, write_json
from selfalign.signals import stop_signals
from selfalign.vision import Vision, open_encoder

ENCODE_BATCH = 16
"""Images encoded at once."""


@dataclass(frozen=True)
class _Job:
    """What a worker needs to write any shard."""

    root: Path
    sources: Any
    """A queue with the source for each worker. It may be large, and a process that is started waits
    for all that it is started with; a queue is filled while others start."""
    config: PrepareConfig
    layout: Layout
    done: Any
    """Shared number of images done."""
    started: Any
    """Shared number of workers that have started."""
    stop: Any
    """Shared event: give up."""
    plugins: tuple[Path, ...]
    """Files that registered parts, encoders perhaps."""

    def images_of(self, shard: int) -> range:
        """Positions in the source."""
        first = shard * self.layout.shard_images
        return range(first, min(first + self.layout.shard_images, self.layout.images))


class _Count:
    """What `multiprocessing.Value` is to processes, for threads."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def get_lock(self) -> threading.Lock:
        """Held while the number is changed."""
        return self._lock


class _StoppedError(Exception):
    """The work was called off while a shard was being written."""


class _Worker:
    """Writes shards, in a process of its own or in a thread."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.source: Source = job.sources.get()
        self.encode: Callable[[Tensor], Tensor] | None = None
        """From images (B, 3, S, S), as bytes, to what is stored of them."""
        if job.layout.kind == "features":
            vision = open_encoder(job.layout.encoder, job.layout.image_size).to(self._device())
            self.encode = partial(_features, vision)
        elif job.layout.kind == "moments" and not self.source.moments:
            autoencoder: Any = vae.load_autoencoder(str(job.root / AUTOENCODER))
            self.encode = partial(vae.encode_moments, autoencoder.to(self._device()))

    def _device(self) -> torch.device:
        """This worker's share of the accelerators, or the CPU."""
        with self.job.started.get_lock():
            rank, self.job.started.value = self.job.started.value, self.job.started.value + 1
        devices = torch.accelerator.device_count()
        device = torch.accelerator.current_accelerator()
        if device is None or not devices:
            return torch.device("cpu")
        return torch.device(f"{device.type}:{rank % devices}")

    def write(self, number: int) -> Shard:
        """Write one shard, its checksums and its record, each whole or not at all, in this order.

        Raises:
            UserError: an image cannot be read, or the disk does not take the shard.
        """
        job, images = self.job, self.job.images_of(number)
        name = f"shard-{number:05d}.bin"
        skipped: list[int] = []
        digest = hashlib.sha256()
        checksums: list[int] = []

        def write(path: Path) -> None:
            with path.open("wb") as file:
                for start in range(images.start, images.stop, ENCODE_BATCH):
                    if job.stop.is_set():
                        raise _StoppedError
                    batch = range(start, min(start + ENCODE_BATCH, images.stop))
                    records = self._records(batch, skipped)
                    content = records.tobytes()
                    file.write(content)
                    digest.update(content)
                    views = records.reshape(-1, *records.shape[2:])
                    checksums.extend(xxhash.xxh3_64_intdigest(view.tobytes()) for view in views)
                    with job.done.get_lock():
                        job.done.value += len(batch)

        write_whole(job.root / name, write, len(images) * job.layout.record_bytes)
        finished = Shard(name, len(images) - len(skipped), digest.hexdigest(), tuple(skipped))
        sums = np.array(checksums, "<u8")
        write_whole(job.root / finished.checksums, lambda path: sums.tofile(path))
        write_json(job.root / record_name(number), finished)
        return finished

    def _records(self, batch: range, skipped: list[int]) -> np.ndarray:
        """Records of images at these positions; unreadable ones are added to `skipped`."""
        layout = self.job.layout
        read = []
        for index in batch:
            try:
                read.append(self._read(index))
            except UnreadableImageError:
                if not self.job.config.skip_unreadable:
                    raise
                skipped.append(index)
        if not read:
            return np.empty((0, *layout.shape), layout.dtype)
        records = torch.stack(read)
        if self.encode is not None:
            views = [records, records.flip(-1)][: layout.shape[0]]
            records = torch.cat([self.encode(view) for view in views])
        by_view = records.unflatten(0, (-1, len(read))).transpose(0, 1).numpy()
        with np.errstate(over="ignore"):
            stored = by_view.astype(layout.dtype)
        if layout.kind != "pixels" and not np.isfinite(stored).all():
            names = [self.source.names[index] for index in batch if index not in skipped]
            worst = names[int(np.isfinite(stored).all(axis=(1, 2, 3, 4)).argmin())]
            raise UserError(
                f"the {'latents' if layout.kind == 'moments' else 'features'} of {worst} are not finite in "
                f"{layout.dtype}: use --dtype float32, or another network"
            )
        return stored

    def _read(self, index: int) -> Tensor:
        source, layout = self.source, self.job.layout
        if source.moments:
            return torch.from_numpy(read_moments(source, index, layout.shape[1:]))
        return decode_image(
            lambda: source.load(index),
            source.names[index],
            layout.image_size,
            self.job.config.background,
        )


def _features(vision: Vision, images: Tensor) -> Tensor:
    return vision(images.to(vision.mean.device).float() / 255).float().cpu()


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


_job: _Job
_worker: _Worker | None


def _start_worker(job: _Job) -> None:
    global _job, _worker
    parent = multiprocessing.parent_process()
    if parent is not None:
        # When the first process is killed, nothing else would end this one.
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
        torch.set_num_threads(max(1, torch.get_num_threads() // job.config.processes))
    for file in job.plugins:
        load_plugin(str(file))
    _job, _worker = job, None


def _write_shard(number: int) -> Shard:
    global _worker
    # Not in _start_worker, whose errors the pool would not pass on.
    _worker = _worker or _Worker(_job)
    return _worker.write(number)


def write_shards(
    root: Path, source: Source, config: PrepareConfig, layout: Layout, progress: Progress
) -> list[Shard]:
    """All shards of the set, of which finished ones are not written again.

    Raises:
        UserError: an image cannot be read, the disk does not take a shard, or a process died.
    """
    count = -(-layout.images // layout.shard_images)
    found = {number: finished_shard(root, number, layout) for number in range(count)}
    shards = {number: shard for number, shard in found.items() if shard is not None}
    missing = [number for number in found if number not in shards]
    processes = min(config.processes, len(missing))
    context = multiprocessing.get_context("spawn")
    job: _Job
    plugins = loaded_plugins()
    if processes > 1:
        counters = context.Value("q", 0), context.Value("q", 0)
        job = _Job(root, context.Queue(), config, layout, *counters, context.Event(), plugins)
    else:
        counts, stop = (_Count(), _Count()), threading.Event()
        job = _Job(root, queue.SimpleQueue(), config, layout, *counts, stop, plugins)
    sources, done = job.sources, job.done
    done.value = sum(len(job.images_of(number)) for number in shards)
    progress(done.value, layout.images)
    if not missing:
        return list(shards.values())
    pool: concurrent.futures.Executor
    if processes == 1:
        pool = concurrent.futures.ThreadPoolExecutor(1, initializer=_start_worker, initargs=(job,))
    else:
        pool = concurrent.futures.ProcessPoolExecutor(
            processes, mp_context=context, initializer=_start_worker, initargs=(job,)
        )
        sources.cancel_join_thread()  # a process that died leaves its copy behind
    try:
        with _interrupts_blocked():
            futures = {pool.submit(_write_shard, number): number for number in missing}
        for _ in range(processes):
            sources.put(source)
        waiting = set(futures)
        while waiting:
            ready, waiting = concurrent.futures.wait(
                waiting, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED
            )
            shards |= {futures[future]: future.result() for future in ready}
            progress(done.value, layout.images)
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "a process died while it prepared images, perhaps for lack of memory: the same command "
            "continues, and fewer --processes need less"
        ) from error
    finally:
        job.stop.set()
        pool.shutdown(cancel_futures=True)
    return [shards[number] for number in sorted(shards)]


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Delays what a terminal sends; processes started here never see it, as only the first should react."""
    blocked = set(stop_signals()) - {signal.SIGTERM}  # by which a pool ends its processes
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def record_name(number: int) -> str:
    """Beside a finished shard while others are missing: what the manifest will say of it."""
    return f"shard-{number:05d}.json"


def finished_shard(root: Path, number: int, layout: Layout) -> Shard | None:
    """What is known of a finished shard; None for one that has to be written."""
    record = root / record_name(number)
    if not record.exists():
        return None
    shard = read_json(record, Shard)
    return None if check_sizes(root, layout, [shard], checksums=True) else shard

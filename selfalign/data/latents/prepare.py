"""From a source of images to a stored set: in parallel, shard by shard, and again after any kill."""

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import queue
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from selfalign.data.folder import decode_image, printable, split_by_hash
from selfalign.data.latents import autoencoder as vae
from selfalign.data.latents.sources import Source, open_source
from selfalign.data.latents.store import (
    AUTOENCODER,
    INDEX,
    MANIFEST,
    PARTIAL_SUFFIX,
    Layout,
    Manifest,
    Progress,
    Shard,
    file_sha256,
    layout_from_dict,
    read_json,
    read_manifest,
    shard_from_dict,
    whole_file,
    write_json,
    writing_to,
)
from selfalign.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PLAN = "plan.json"
"""The layout of a set that is being made."""
HELDOUT_SHARE = 0.01
SHARD_BYTES = 2**30
"""Largest shard."""
SHARDS = 64
"""Into how many shards a set is cut unless they get too large or too small. A kill costs the shards
that were being written, and processes share the work by shards."""
SMALLEST_SHARD = 512
"""Images of the smallest shards that sets are cut into."""
ENCODE_BATCH = 16
"""Images encoded at once."""


@dataclass(frozen=True)
class PrepareConfig:
    """How images are prepared."""

    image_size: int = 256
    """Side of the square that images are cropped and resized to."""
    vae: str = "ema"
    """Autoencoder: ema or mse (those of Stable Diffusion), a folder with one, or none for pixels."""
    dtype: Literal["float16", "float32"] = "float16"
    """Numbers that latents are stored as; pixels are stored as bytes."""
    flip: bool = False
    """Store each image's mirrored copy too, for --data.flip."""
    skip_unreadable: bool = False
    """Leave unreadable images out and list them in the manifest, instead of stopping."""
    processes: int = 1
    """Processes that decode and encode; GPUs are shared out among them."""

    def __post_init__(self) -> None:
        for name in ("image_size", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: allowed is a number from 1")
        if self.dtype not in ("float16", "float32"):
            raise UserError(f"dtype is {self.dtype!r}: allowed are float16, float32")
        if self.flip and self.vae == "none":
            raise UserError(
                "flip is True with vae none: allowed is False, as pixels are mirrored when read"
            )


def prepare(
    source: str,
    out: Path,
    config: PrepareConfig,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Make a stored set, or finish one that was begun with the same settings.

    Args:
        source: where the images are; see `open_source`.
        out: folder for the result.
        config: how they are prepared.
        progress: called with images done and images in all.

    Raises:
        UserError: the source, the autoencoder or the disk do not allow it, or `out` holds another
            set. What is finished stays, and the same call continues.
    """
    opened = open_source(source)
    autoencoder = None if config.vae == "none" else _load(config, opened)
    layout = _layout(source, opened, config, autoencoder)
    if out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"out is {str(out)!r}, inside the source: allowed is any other folder")
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            if (out / MANIFEST).exists():
                manifest = read_manifest(out)
                _require_same(out / MANIFEST, manifest.layout, layout)
                _clean(out)
                progress(layout.images, layout.images)
                return manifest
            _begin(out, layout, autoencoder)
            shards = _write_shards(out, opened, config, layout, progress)
            return _finish(out, opened, layout, shards)


def _load(config: PrepareConfig, source: Source) -> "AutoencoderKL | None":
    try:
        return vae.load_autoencoder(config.vae)
    except UserError:
        # Moments are encoded already, and need their autoencoder only when they are decoded.
        if source.moments and config.vae in vae.NAMED:
            return None
        raise


def _layout(
    name: str, source: Source, config: PrepareConfig, autoencoder: "AutoencoderKL | None"
) -> Layout:
    size = config.image_size
    scale, shift = (1.0, 0.0) if config.vae == "none" else (vae.NAMED_SCALE, 0.0)
    sha256 = ""
    shape: tuple[int, ...] = (3, size, size)
    if config.vae == "none" and source.moments:
        raise UserError(
            f"source {name!r} holds latents, and vae is none: allowed is the VAE that "
            "encoded them (ema, mse or a folder)"
        )
    if autoencoder is not None:
        scale, shift = vae.scale_and_shift(autoencoder)
        sha256 = vae.weights_sha256(autoencoder.state_dict().items())
        shape = _moments_shape(config, autoencoder)
    if source.moments:
        stored = _read_moments(source, 0).shape
        if autoencoder is None:
            shape = (stored[0], size // 8, size // 8)  # the named ones shrink images by 8
        if stored != shape:
            raise UserError(
                f"{source.names[0]} has the shape {stored}: with vae {config.vae} and image_size "
                f"{size}, allowed is {shape}"
            )
        if config.flip:
            raise UserError("flip is True, but the source holds latents: allowed is False")
    dtype = "uint8" if config.vae == "none" else config.dtype
    record_bytes = (1 + config.flip) * int(np.prod(shape)) * np.dtype(dtype).itemsize
    images = len(source.names)
    return Layout(
        kind="pixels" if config.vae == "none" else "moments",
        dtype=dtype,
        shape=(1 + config.flip, *shape),  # type: ignore[arg-type]
        image_size=size,
        scale=scale,
        shift=shift,
        autoencoder="" if config.vae == "none" else config.vae,
        autoencoder_sha256=sha256,
        class_names=source.class_names,
        source=printable(name),
        fingerprint=source.fingerprint,
        images=images,
        shard_images=max(
            1, min(SHARD_BYTES // record_bytes, max(SMALLEST_SHARD, -(-images // SHARDS)))
        ),
    )


def _moments_shape(config: PrepareConfig, autoencoder: "AutoencoderKL") -> tuple[int, ...]:
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if config.image_size % factor or autoencoder.config.in_channels != 3:
        raise UserError(
            f"image_size is {config.image_size} and vae {config.vae!r} takes "
            f"{autoencoder.config.in_channels} channels: allowed are multiples of {factor}, and "
            "VAEs of RGB images"
        )
    side = config.image_size // factor
    return (2 * autoencoder.config.latent_channels, side, side)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    import fcntl

    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{str(root)!r} is being prepared by another process") from error
        yield


def _begin(root: Path, layout: Layout, autoencoder: "AutoencoderKL | None") -> None:
    """Write the plan, or check that the set was begun with the same one."""
    for partial in root.glob(f"*{PARTIAL_SUFFIX}"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    if (root / PLAN).exists():
        _require_same(root / PLAN, layout_from_dict(read_json(root / PLAN)), layout)
    else:
        write_json(root / PLAN, layout)
    finished = (shard.stat().st_size for shard in root.glob("shard-*.bin"))
    missing = layout.images * layout.record_bytes - sum(finished)
    free = shutil.disk_usage(root).free
    if missing > free:
        raise UserError(
            f"{str(root)!r} has {free / 1e6:,.1f} MB free: needed are {missing / 1e6:,.1f} MB"
        )
    if autoencoder is not None and not (root / AUTOENCODER).exists():
        vae.store_autoencoder(autoencoder, root / AUTOENCODER)


def _require_same(path: Path, begun: Layout, wanted: Layout) -> None:
    by_content = {"source"} | ({"autoencoder"} if wanted.autoencoder_sha256 else set())
    for field in dataclasses.fields(Layout):
        if field.name in by_content:
            continue  # paths may be spelt differently: fingerprint and hash say what they lead to
        before, now = getattr(begun, field.name), getattr(wanted, field.name)
        if before != now:
            raise UserError(
                f"{path} was made with another {field.name} ({before!r}, now {now!r}): continue "
                "with the same settings and source, or choose another folder"
            )


def _record_name(shard: int) -> str:
    """Beside a finished shard while others are missing: what the manifest will say of it."""
    return f"shard-{shard:05d}.json"


# The work, shard by shard


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

    def images_of(self, shard: int) -> range:
        """Positions in the source."""
        first = shard * self.layout.shard_images
        return range(first, min(first + self.layout.shard_images, self.layout.images))


class _StoppedError(Exception):
    """The work was called off while a shard was being written."""


class _Worker:
    """Writes shards, in a process of its own or in a thread."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.source: Source = job.sources.get()
        self.autoencoder: AutoencoderKL | None = None
        if job.layout.kind == "moments" and not self.source.moments:
            with job.started.get_lock():
                rank, job.started.value = job.started.value, job.started.value + 1
            self.autoencoder = vae.load_autoencoder(str(job.root / AUTOENCODER))
            devices = torch.accelerator.device_count()
            device = torch.accelerator.current_accelerator()
            if device is not None and devices:
                self.autoencoder.to(f"{device.type}:{rank % devices}")

    def write(self, shard: int) -> Shard:
        """Write one shard, whole or not at all.

        Raises:
            UserError: an image cannot be read, or the disk does not take the shard.
        """
        job, images = self.job, self.job.images_of(shard)
        name = f"shard-{shard:05d}.bin"
        skipped: list[int] = []
        digest = hashlib.sha256()
        with writing_to(job.root):
            with whole_file(job.root / name) as file:
                for start in range(images.start, images.stop, ENCODE_BATCH):
                    if job.stop.is_set():
                        raise _StoppedError
                    batch = range(start, min(start + ENCODE_BATCH, images.stop))
                    content = self._records(batch, skipped).tobytes()
                    file.write(content)
                    digest.update(content)
                    with job.done.get_lock():
                        job.done.value += len(batch)
            finished = Shard(name, len(images) - len(skipped), digest.hexdigest(), tuple(skipped))
            write_json(job.root / _record_name(shard), finished)
        return finished

    def _records(self, batch: range, skipped: list[int]) -> np.ndarray:
        """Records of images at these positions; unreadable ones are added to `skipped`."""
        layout = self.job.layout
        read = []
        for index in batch:
            try:
                read.append(self._read(index))
            except UserError:
                if not self.job.config.skip_unreadable:
                    raise
                skipped.append(index)
        if not read:
            return np.empty((0, *layout.shape), layout.dtype)
        records = torch.stack(read)
        if self.autoencoder is not None:
            views = [records, records.flip(-1)][: layout.shape[0]]
            records = torch.cat([vae.encode_moments(self.autoencoder, view) for view in views])
        by_view = records.unflatten(0, (-1, len(read))).transpose(0, 1).numpy()
        with np.errstate(over="ignore"):
            stored = by_view.astype(layout.dtype)
        if layout.kind == "moments" and not np.isfinite(stored).all():
            names = [self.source.names[index] for index in batch if index not in skipped]
            worst = names[int(np.isfinite(stored).all(axis=(1, 2, 3, 4)).argmin())]
            raise UserError(
                f"the latents of {worst} are not finite in {layout.dtype}: use --dtype float32, or "
                "another VAE"
            )
        return stored

    def _read(self, index: int) -> Tensor:
        source, layout = self.source, self.job.layout
        if source.moments:
            return torch.from_numpy(_read_moments(source, index, layout.shape[1:]))
        return decode_image(lambda: source.load(index), source.names[index], layout.image_size)


def _read_moments(source: Source, index: int, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Stored moments (2C, H, W), checked against the shape that all should have."""
    try:
        moments = source.load(index)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{source.names[index]} is not a readable array: {error}") from error
    if moments.ndim == 4 and len(moments) == 1:
        moments = moments[0]
    if moments.dtype.kind != "f" or moments.ndim != 3 or shape not in (None, moments.shape):
        raise UserError(
            f"{source.names[index]} is an array of {moments.dtype} and shape {moments.shape}: "
            f"allowed is {shape or 'mean and standard deviation, (2C, H, W)'} of floats"
        )
    return moments.astype(np.float32)


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
    _job, _worker = job, None


def _write_shard(shard: int) -> Shard:
    global _worker
    # Not in _start_worker, whose errors the pool would not pass on.
    _worker = _worker or _Worker(_job)
    return _worker.write(shard)


def _write_shards(
    root: Path, source: Source, config: PrepareConfig, layout: Layout, progress: Progress
) -> list[Shard]:
    """All shards of the set, of which finished ones are not written again."""
    count = -(-layout.images // layout.shard_images)
    found = {number: _finished(root, number, layout) for number in range(count)}
    shards = {number: shard for number, shard in found.items() if shard is not None}
    missing = [number for number in found if number not in shards]
    processes = min(config.processes, len(missing))
    context = multiprocessing.get_context("spawn")
    sources: Any = context.Queue() if processes > 1 else queue.SimpleQueue()
    done, started = context.Value("q", 0), context.Value("q", 0)
    job = _Job(root, sources, config, layout, done, started, context.Event())
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
    """Delays Ctrl-C; processes started here never see it, as only the first should react to it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _finished(root: Path, number: int, layout: Layout) -> Shard | None:
    """What is known of a finished shard; None for one that has to be written."""
    record = root / _record_name(number)
    if not record.exists():
        return None
    shard = shard_from_dict(read_json(record))
    path = root / shard.file
    whole = path.is_file() and path.stat().st_size == shard.records * layout.record_bytes
    return shard if whole else None


def _finish(root: Path, source: Source, layout: Layout, shards: Sequence[Shard]) -> Manifest:
    """Write the index and the manifest, after which the set can be read."""
    skipped = sorted(index for shard in shards for index in shard.skipped)
    kept = np.setdiff1d(np.arange(layout.images), skipped)
    if len(kept) < 2:
        raise UserError(
            f"{len(kept)} of the {layout.images} images of {layout.source} can be read: needed are "
            "at least 2, of which one is held out"
        )
    index = np.zeros((len(kept), 2), np.int32)
    index[:, 0] = source.labels[kept]
    index[split_by_hash([source.names[i] for i in kept], HELDOUT_SHARE)[1], 1] = 1
    with whole_file(root / INDEX) as file:
        np.save(file, index, allow_pickle=False)
    manifest = Manifest(
        layout,
        tuple(shards),
        file_sha256(root / INDEX),
        tuple(source.names[i] for i in skipped),
    )
    write_json(root / MANIFEST, manifest)
    _clean(root)
    return manifest


def _clean(root: Path) -> None:
    """Remove what only an unfinished set needs."""
    for path in (root / PLAN, *root.glob("shard-*.json")):
        path.unlink(missing_ok=True)

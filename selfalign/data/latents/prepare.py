"""From a source of images to a stored set: in parallel, shard by shard, and again after any kill."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfalign.data.latents import autoencoder as vae
from selfalign.data.latents.layout import features_layout, make_layout, require_same
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources import Source, open_source
from selfalign.data.latents.sources.source import without
from selfalign.data.latents.store import (
    AUTOENCODER,
    INDEX,
    MANIFEST,
    Layout,
    Manifest,
    Progress,
    Shard,
    features_folder,
    file_sha256,
    read_manifest,
)
from selfalign.data.latents.workers import write_shards
from selfalign.data.listing import ignored
from selfalign.data.splits import order_by_hash, split_in_order
from selfalign.disk import (
    LOCK,
    locked,
    real_path,
    reason,
    remove,
    require_room,
    sweep,
    write_whole,
)
from selfalign.errors import UserError
from selfalign.records import read_json, write_json
from selfalign.vision import open_encoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PLAN = "plan.json"
"""The layout of a set that is being made."""
HELDOUT_SHARE = 0.01
STATISTICS_AT_ONCE = 256
"""Records that are measured at once."""


def prepare(
    source: str,
    out: Path,
    config: PrepareConfig,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Make a stored set, or finish one that was begun with the same settings.

    Args:
        source: where the images are; see `open_source`.
        out: folder for the result, new or empty, or with what an interrupted call left.
        config: how they are prepared.
        progress: called with images done and images in all, those of every encoder counted anew.

    Raises:
        UserError: the source, the autoencoder, an encoder or the disk do not allow it, or `out` holds
            another set. What is finished stays, and the same call continues; where nothing is, nothing
            stays.
    """
    opened = open_source(source, config)
    for word in config.encoder:
        open_encoder(word, config.image_size)
    autoencoder = None if config.vae == "none" else _load(config, opened)
    layout = make_layout(source, opened, config, autoencoder)
    if real_path(out).is_relative_to(real_path(Path(source))):
        raise UserError(f"out is {str(out)!r}, inside the source: allowed is any other folder")
    _require_ours(out)
    existed = out.exists()
    with _writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, "is being prepared by another process"), _nothing_half_begun(out, existed):
            phases = _phases(progress, layout.images, 1 + len(config.encoder))
            manifest = _images(out, opened, config, layout, autoencoder, next(phases))
            for word in config.encoder:
                _features(out, source, opened, config, manifest, word, next(phases))
            return manifest


def _images(
    out: Path,
    source: Source,
    config: PrepareConfig,
    layout: Layout,
    autoencoder: "AutoencoderKL | None",
    progress: Progress,
) -> Manifest:
    """The set itself, which may be finished already."""
    if (done := _finished(out, layout, progress)) is not None:
        return done
    _begin(out, layout, autoencoder)
    return _finish(out, source, layout, write_shards(out, source, config, layout, progress))


def _finished(folder: Path, layout: Layout, progress: Progress) -> Manifest | None:
    """The manifest of a folder that holds all of this already; None of others."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    require_same(manifest.layout, layout, folder / MANIFEST)
    _clean(folder)
    progress(layout.images, layout.images)
    return manifest


def _features(
    out: Path,
    name: str,
    source: Source,
    config: PrepareConfig,
    manifest: Manifest,
    word: str,
    progress: Progress,
) -> Manifest:
    """What an encoder makes of those images that the set holds."""
    skipped = [index for shard in manifest.shards for index in shard.skipped]
    kept = without(source, skipped)
    config = dataclasses.replace(config, skip_unreadable=False)  # all of these have been read
    return write_features(
        features_folder(out, word), kept, config, word, name, manifest.fingerprint, progress
    )


def write_features(
    folder: Path,
    source: Source,
    config: PrepareConfig,
    word: str,
    name: str,
    fingerprint: str,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Store what an encoder makes of images, or finish what was begun.

    Args:
        folder: where to.
        source: the images.
        config: side, background and dtype, mirrored copies, processes.
        word: of the encoder.
        name: of the source, in messages.
        fingerprint: of the set of images that the features belong to.
        progress: called with images done and images in all.

    Raises:
        UserError: an image cannot be read, the disk does not take it, or `folder` holds features of other
            images or by another encoder.
    """
    layout = features_layout(
        word, open_encoder(word, config.image_size), source, config, name, fingerprint
    )
    folder.mkdir(parents=True, exist_ok=True)
    if (done := _finished(folder, layout, progress)) is not None:
        return done
    _begin(folder, layout, None)
    shards = write_shards(folder, source, config, layout, progress)
    manifest = Manifest(layout, tuple(shards), "", (), {}, "xxh3_64")
    write_json(folder / MANIFEST, manifest)
    _clean(folder)
    return manifest


def _phases(progress: Progress, images: int, count: int) -> Iterator[Progress]:
    """A progress for each of several passes over the images, which are shown as one."""
    for phase in range(count):

        def show(done: int, total: int, before: int = phase * images) -> None:
            progress(before + done, count * images)

        yield show


def _load(config: PrepareConfig, source: Source) -> "AutoencoderKL | None":
    try:
        return vae.load_autoencoder(config.vae)
    except UserError:
        # Moments are encoded already, and need their autoencoder only when they are decoded.
        if source.moments and config.vae in vae.NAMED:
            return None
        raise


def _require_ours(out: Path) -> None:
    """Refuse a folder that holds something else than a set, finished or begun."""
    try:
        if not out.exists() or (out / MANIFEST).exists() or (out / PLAN).exists():
            return
        others = sorted(entry.name for entry in out.iterdir() if not ignored(entry.name))
    except OSError as error:
        raise UserError(f"out is {str(out)!r}: cannot be used ({error.strerror})") from error
    if others:
        raise UserError(
            f"out is {str(out)!r}, which holds other files ({others[0]}): allowed is a new or an empty "
            "folder, or one with a set that was begun"
        )


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {str(out)!r}: {reason(error, out)}") from error


@contextmanager
def _nothing_half_begun(out: Path, existed: bool) -> Iterator[None]:
    """Remove what a block has made if it fails before any shard is finished."""
    begun = (out / PLAN).exists() or (out / MANIFEST).exists()
    try:
        yield
    except BaseException:
        if not begun and not any(out.glob("shard-*.json")):
            if existed:
                for name in (PLAN, AUTOENCODER, LOCK):
                    remove(out / name)
            else:
                remove(out)
        raise


def _begin(root: Path, layout: Layout, autoencoder: "AutoencoderKL | None") -> None:
    """Write the plan, or check that the set was begun with the same one."""
    if (root / PLAN).exists():
        require_same(read_json(root / PLAN, Layout), layout, root / PLAN)
    sweep(root)
    for former in ("shard-*.bin.part", "shard-*.json.part", f"{AUTOENCODER}.part"):
        for partial in root.glob(former):  # what version 0.1.0 left when it was killed
            remove(partial)
    if not (root / PLAN).exists():
        write_json(root / PLAN, layout)
    finished = (shard.stat().st_size for shard in root.glob("shard-*.bin"))
    missing = layout.images * layout.record_bytes - sum(finished)
    require_room(root, missing, f"{layout.images:,} images")
    if autoencoder is not None and not (root / AUTOENCODER).exists():
        vae.store_autoencoder(autoencoder, root / AUTOENCODER)


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
    names, labels = [source.names[i] for i in kept], index[:, 0].tolist()
    _, heldout = split_in_order(order_by_hash(names), HELDOUT_SHARE, labels)
    index[heldout, 1] = 1
    write_whole(root / INDEX, lambda path: _save(path, index))
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if layout.normalise == "measured":
        mean, std = channel_statistics(root, layout, shards, index[:, 1] == 0)
    manifest = Manifest(
        layout,
        tuple(shards),
        file_sha256(root / INDEX),
        tuple(source.names[i] for i in skipped),
        dict(source.left_out),
        "xxh3_64",
        channel_mean=mean,
        channel_std=std,
    )
    write_json(root / MANIFEST, manifest)
    _clean(root)
    return manifest


def channel_statistics(
    root: Path, layout: Layout, shards: Sequence[Shard], chosen: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every channel of latents as they are drawn from their posteriors.

    Args:
        root: folder of the set.
        layout, shards: what is stored there.
        chosen: (M,) which records count.

    Raises:
        UserError: a channel is the same everywhere.
    """
    channels = layout.shape[1] // 2
    total = np.zeros((2, channels))
    count, first = 0, 0
    for shard in shards:
        records = np.memmap(
            root / shard.file, layout.dtype, "r", shape=(shard.records, *layout.shape)
        )
        for start in range(0, shard.records, STATISTICS_AT_ONCE):
            part = records[start : start + STATISTICS_AT_ONCE]
            kept = chosen[first + start : first + start + len(part)]
            means, stds = np.split(part[kept].astype(np.float64), 2, axis=2)
            total[0] += means.sum(axis=(0, 1, 3, 4))
            total[1] += (means**2 + stds**2).sum(axis=(0, 1, 3, 4))
            count += means.size // channels
        first += shard.records
    mean, square = total / count
    std = np.sqrt(np.maximum(square - mean**2, 0))
    if not std.all():
        raise UserError(
            f"channel {int(np.argmin(std))} of the latents is the same everywhere: allowed is --normalise "
            "config"
        )
    return tuple(mean.tolist()), tuple(std.tolist())


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy appends a suffix to it
        np.save(file, array, allow_pickle=False)


def _clean(root: Path) -> None:
    """Remove what only an unfinished set needs."""
    for path in (root / PLAN, *root.glob("shard-*.json")):
        path.unlink(missing_ok=True)

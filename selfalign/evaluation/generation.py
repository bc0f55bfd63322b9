"""Samples of a run for evaluation: made in shards by all processes, and continued where they stopped."""

import contextlib
import hashlib
import math
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from selfalign.arrays import Array, Npz
from selfalign.data.shapes import to_uint8
from selfalign.data.source import DataSource
from selfalign.disk import locked, require_room, require_writable, write_arrays, write_whole
from selfalign.errors import UserError
from selfalign.evaluation.config import EvaluationConfig, Progress
from selfalign.evaluation.inputs import ImageSet, open_images
from selfalign.processes import together
from selfalign.records import write_json
from selfalign.runs.load import LoadedRun, sampling_record
from selfalign.sampling.generate import LABEL_BYTES, Labels, check_sampling, generate
from selfalign.sampling.lengths import draw_lengths
from selfalign.sampling.settings import SamplingConfig

SHARD = 256
"""Samples of a shard, the most that an interruption costs a process."""
RUN_SAMPLES = 1000
"""Samples of a run where --num is left out."""
_FIELDS = 7
"""Sampling settings of version 0.1.0: later ones count in a folder's name where they are not the default,
so that samples which were made before there were any are found again."""
LIKE_DATA = "those of training samples of the class"
"""How long samples are where the data's lengths are unequal."""


@dataclass(frozen=True)
class PlannedSamples:
    """A run's samples, before they are made."""

    run: LoadedRun
    weights: str
    """`ema` or `raw`."""
    sampling: SamplingConfig
    labels: Labels
    num: int
    shape: tuple[int, int, int]
    """C, H and W of an image."""
    folder: Path
    """Where they are kept."""
    lengths: tuple[int, ...] | None = None
    """Of each, where the data's are unequal."""

    @property
    def label_range(self) -> tuple[int, int] | None:
        """Smallest and largest label; None for a model without classes."""
        classes = self.run.model.num_classes
        if isinstance(self.labels, str):
            return (0, classes - 1) if classes else None
        return min(self.labels), max(self.labels)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that the samples depend on, as sampling.json holds it."""
        told = {"weights": self.weights, "labels": self.labels}
        if self.lengths is not None:
            told |= {"lengths": LIKE_DATA}
        return sampling_record(self.run, self.sampling, **told)


def plan_samples(
    run: LoadedRun,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    source: DataSource | None = None,
) -> PlannedSamples:
    """What a run is to be sampled to, refused before any work where it cannot be.

    Args:
        run: the model.
        config: how many samples, of which weights and labels, and where to.
        sampling: solver, steps, guidance, seed.
        source: the data, like whose the lengths of samples are where they are unequal.

    Raises:
        UserError: settings that the model does not allow, a folder that cannot be written into, a disk
            that is too small, or kept samples that are damaged.
    """
    check_sampling(run.model, sampling, run.config.views.class_dropout, config.labels)
    if run.config.padded and sampling.mask_ratio:
        raise UserError(
            f"mask_ratio is {sampling.mask_ratio}: allowed is 0 for a model of samples of unequal lengths"
        )
    shape = run.image_shape
    folder = samples_folder(run, config.weights, sampling, config.labels)
    num = config.num or RUN_SAMPLES
    kept = _kept(folder / "samples.npz")
    if kept < num:
        try:
            require_writable(folder)
        except UserError:
            if config.out is None:
                raise
            folder = config.out / folder.name
            require_writable(folder)
            kept = _kept(folder / "samples.npz")
        size = math.prod(shape) + LABEL_BYTES
        missing = num - kept
        # Shards and what they are joined to lie side by side for a moment.
        if missing > 0:
            require_room(folder, size * (num + missing), f"{num:,} samples")
    lengths = None
    if run.config.padded and source is not None:
        classes = run.model.num_classes
        lengths = draw_lengths(source.train, config.labels, classes, sampling.seed, num)
    return PlannedSamples(run, config.weights, sampling, config.labels, num, shape, folder, lengths)


def samples_folder(
    run: LoadedRun, weights_name: str, sampling: SamplingConfig, labels: Labels = "random"
) -> Path:
    """Where a run keeps the samples of these settings: its name is their hash, the weights included.

    How many samples there are is not part of it: sample i is a function of the settings and i.
    """
    usual = SamplingConfig().record()
    settings = [
        f"{name}={value!r}"
        for number, (name, value) in enumerate(sampling.record().items())
        if number < _FIELDS or value != usual.get(name)
    ]
    if labels != "random":
        settings.append(f"labels={labels!r}")
    if run.config.padded:
        settings.append(f"lengths={LIKE_DATA!r}")
    digest = hashlib.sha256(f"SamplingConfig({', '.join(settings)})".encode())
    for name, tensor in sorted(run.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    weights_name = weights_name.replace(":", "-")
    name = f"step_{run.step:08d}-{weights_name}-{digest.hexdigest()[:12]}"
    return run.folder / "evaluation" / name


def make_samples(
    planned: PlannedSamples, batch_size: int, accelerator: Accelerator, progress: Progress
) -> ImageSet:
    """The samples: those that are kept already, and the rest made now.

    `samples.npz` holds the finished ones, in ADM's format; shards beside it are joined to it once all
    are whole.

    Args:
        planned: from `plan_samples`.
        batch_size: samples at once in each process.
        accelerator: its processes share the shards.
        progress: told what is done, and how much of how much.

    Raises:
        UserError: another process makes the same samples, or the disk is full.
    """
    folder, num = planned.folder, planned.num
    file, shards = folder / "samples.npz", folder / "shards"
    done = _kept(file)
    accelerator.wait_for_everyone()  # all processes have seen the same file
    if done < num:
        parts = [range(i, min(i + SHARD, num)) for i in range(done, num, SHARD)]
        names = [shards / f"{part.start:08d}-{part.stop:08d}.npz" for part in parts]
        with contextlib.ExitStack() as stack:
            with together(accelerator):
                if accelerator.is_main_process:
                    stack.enter_context(
                        locked(shards, "is in use: another process is making these samples")
                    )
                todo = [
                    (part, name)
                    for part, name in zip(parts, names, strict=True)
                    if not _whole(name, len(part))
                ]
            own = todo[accelerator.process_index :: accelerator.num_processes]
            with together(accelerator):
                for finished, (part, name) in enumerate(own):
                    progress("sampling", finished * SHARD, len(own) * SHARD)
                    _write_shard(planned, part, name, batch_size)
                progress("sampling", 1, 1)
            with together(accelerator):
                if accelerator.is_main_process:
                    whole = [file] if done else []
                    _join(whole + names, file)
                    write_json(folder / "sampling.json", planned.settings)
                    shutil.rmtree(shards)
    return open_images(file).first(num)


def _kept(file: Path) -> int:
    """How many samples a file holds; 0 where there is none."""
    if not file.is_file():
        return 0
    try:
        return len(open_images(file))
    except UserError as error:
        raise UserError(
            f"the samples that this run kept are damaged: {error}; they are made again once "
            f"{file.parent} is removed"
        ) from error


def _whole(shard: Path, count: int) -> bool:
    """Whether a shard is there; a damaged one is made again."""
    try:
        return shard.is_file() and len(open_images(shard)) == count
    except UserError:
        return False


def _write_shard(planned: PlannedSamples, part: range, file: Path, batch_size: int) -> None:
    run = planned.run
    batches = generate(
        run.model,
        run.config.flow.path,
        planned.sampling,
        len(part),
        batch_size=batch_size,
        labels=planned.labels,
        first=part.start,
        separate=run.config.views.attention == "separated",
        lengths=planned.lengths,
    )
    images, labels = [], []
    for batch in batches:
        images.append(to_uint8(run.decode(batch.images)).permute(0, 2, 3, 1).cpu().numpy())
        labels.append(batch.labels.numpy())
    arrays = {"arr_0": np.concatenate(images)}
    if run.model.num_classes:
        arrays["arr_1"] = np.concatenate(labels)
    write_arrays(file, arrays)


def _join(parts: list[Path], file: Path) -> None:
    """Write the arrays of many files, one after the other, into one; a part in memory at a time."""

    def write(path: Path) -> None:
        opened = [dict(Npz(part)) for part in parts]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name in opened[0]:
                _write_member(archive, name, [arrays[name] for arrays in opened])

    write_whole(file, write)


def _write_member(archive: zipfile.ZipFile, name: str, arrays: list[Array]) -> None:
    first = arrays[0]
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (sum(map(len, arrays)), *first.shape[1:]),
    }
    with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for chunk in _chunks(arrays):
            stream.write(np.ascontiguousarray(chunk).tobytes())


def _chunks(arrays: list[Array]) -> Iterator[Array]:
    for array in arrays:
        for first in range(0, len(array), SHARD):
            yield array[first : first + SHARD]

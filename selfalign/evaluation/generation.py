"""Samples of a run for evaluation: made in shards by all processes, and continued where they stopped."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from selfalign.disk import write_arrays, write_whole
from selfalign.evaluation.inputs import Array, ImageSet, open_images, open_npz
from selfalign.processes import together
from selfalign.run import LoadedRun
from selfalign.sampling.generate import SamplingConfig, check_sampling, generate, to_uint8

SHARD = 256
"""Samples of a shard, the most that an interruption costs a process."""


def samples_folder(run: LoadedRun, weights_name: str, sampling: SamplingConfig) -> Path:
    """Where a run keeps the samples of these settings: its name is their hash, the weights included.

    How many samples there are is not part of it: sample i is a function of the settings and i.
    """
    digest = hashlib.sha256(repr(sampling).encode())
    for name, tensor in sorted(run.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    name = f"step_{run.step:08d}-{weights_name}-{digest.hexdigest()[:12]}"
    return run.folder / "evaluation" / name


def generate_samples(
    run: LoadedRun,
    sampling: SamplingConfig,
    num: int,
    folder: Path,
    settings: dict[str, Any],
    accelerator: Accelerator,
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> ImageSet:
    """The first `num` samples: those in the folder already, and the rest made now.

    `samples.npz` holds the finished ones, in ADM's format; shards beside it are joined to it once all
    are whole.

    Args:
        run: the model.
        sampling: solver, steps, guidance, seed.
        num: how many samples.
        folder: from `samples_folder`.
        settings: written to sampling.json.
        accelerator: its processes share the shards.
        batch_size: samples at once in each process.
        progress: told what is done, and how much of how much.

    Raises:
        UserError: settings the model does not allow, or a disk that is full.
    """
    check_sampling(run.model, sampling, run.config.views.class_dropout, labels=None)
    file, shards = folder / "samples.npz", folder / "shards"
    done = len(open_images(file)) if file.is_file() else 0
    accelerator.wait_for_everyone()  # all processes have seen the same file
    if done < num:
        parts = [range(i, min(i + SHARD, num)) for i in range(done, num, SHARD)]
        names = [shards / f"{part.start:08d}-{part.stop:08d}.npz" for part in parts]
        todo = [(part, name) for part, name in zip(parts, names, strict=True) if not name.is_file()]
        own = todo[accelerator.process_index :: accelerator.num_processes]
        with together(accelerator):
            for finished, (part, name) in enumerate(own):
                progress("sampling", finished * SHARD, len(own) * SHARD)
                _write_shard(run, sampling, part, name, batch_size)
            progress("sampling", 1, 1)
        with together(accelerator):
            if accelerator.is_main_process:
                whole = [file] if done else []
                _join(whole + names, file)
                write_whole(
                    folder / "sampling.json",
                    lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"),
                )
                for name in shards.glob("*"):
                    name.unlink()
                shards.rmdir()
    return open_images(file).first(num)


def _write_shard(
    run: LoadedRun, sampling: SamplingConfig, part: range, file: Path, batch_size: int
) -> None:
    batches = generate(
        run.model,
        run.config.flow.path,
        sampling,
        len(part),
        batch_size=batch_size,
        first=part.start,
        separate=run.config.views.attention == "separated",
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
        opened = [open_npz(part) for part in parts]
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

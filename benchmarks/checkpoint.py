"""How fast checkpoints are written, checked and loaded, at full size.

    python benchmarks/checkpoint.py [--size XL/2] [--folder DIR] [--cold] [--threads N]

writes one checkpoint of the paper's model into a folder (four times the model's float32 weights), and loads
it as `sample` and as `train --resume` do: checksums, names, shapes, dtypes, finiteness, and the copy into the
model. With --cold its files leave the system's cache before each part.
"""

import argparse
import gc
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from selfalign import recipe
from selfalign.config import ResolvedConfig, resolve
from selfalign.student import build_student
from selfalign.training.checkpoint import (
    FILES,
    WEIGHTS,
    CheckpointState,
    load_optimizer,
    load_weights,
    save_checkpoint,
    verify,
)
from selfalign.training.ema import EMA
from selfalign.training.step import make_optimizer

STATE = "state.json"


def empty_cache(checkpoint: Path) -> None:
    """Have the system forget the files' content."""
    for path in checkpoint.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(name: str, files: list[Path], work: Callable[[], object]) -> None:
    """Do it, and print its rate over the files' bytes; processor time is what other load leaves alone."""
    size = sum(path.stat().st_size for path in files)
    begun, begun_work = time.perf_counter(), time.process_time()
    work()
    taken, worked = time.perf_counter() - begun, time.process_time() - begun_work
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name}: {size / 1e9:.2f} GB in {taken:.2f} s, {size / 1e9 / taken:.2f} GB/s, and "
        f"{size / 1e9 / worked:.2f} GB per second of processor time (peak {peak:.1f} GiB)",
        flush=True,
    )


def write(config: ResolvedConfig, folder: Path) -> Path:
    """A checkpoint whose numbers are random."""
    student = build_student(config)
    ema = EMA(student, config.training.ema_decay, config.training.ema_warmup)
    optimizer = make_optimizer(config, student)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    begun = time.perf_counter()
    made = save_checkpoint(folder, student, ema.model, optimizer, CheckpointState(1), keep=1)
    taken = time.perf_counter() - begun
    size = sum(path.stat().st_size for path in made.iterdir())
    print(
        f"written: {size / 1e9:.2f} GB in {taken:.2f} s, {size / 1e9 / taken:.2f} GB/s", flush=True
    )
    return made


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="XL/2")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = resolve(recipe("sra-dts-as", {"model.size": options.size}), 4, (32, 32), 1000)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        checkpoint = write(config, Path(place))
        gc.collect()
        prepare = (lambda: empty_cache(checkpoint)) if options.cold else (lambda: None)
        student = build_student(config)
        ema = checkpoint / WEIGHTS["ema"]

        def load_ema() -> None:
            verify(checkpoint, [ema.name])
            load_weights(checkpoint, student, ema.name)

        def load_all() -> None:
            verify(checkpoint)
            load_weights(checkpoint, student, WEIGHTS["raw"])
            load_weights(checkpoint, average, WEIGHTS["ema"])
            load_optimizer(checkpoint, student, optimizer)

        prepare()
        timed("checksums", [checkpoint / name for name in FILES], lambda: verify(checkpoint))
        prepare()
        timed("loaded for sampling", [ema], load_ema)
        average = EMA(student, 0.999, False).model
        optimizer = make_optimizer(config, student)
        prepare()
        timed("loaded for resuming", [checkpoint / name for name in FILES], load_all)


if __name__ == "__main__":
    main()

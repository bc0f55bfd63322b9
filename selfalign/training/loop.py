"""The training loop, top to bottom."""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from selfalign.config import RunConfig, TrainingConfig
from selfalign.data import DataSource, training_batches
from selfalign.errors import UserError
from selfalign.models.sit import SiT
from selfalign.objective import Losses
from selfalign.processes import together
from selfalign.training.checkpoint import (
    load_optimizer,
    load_state,
    load_weights,
    save_checkpoint,
)
from selfalign.training.ema import EMA
from selfalign.training.step import TrainingStep, learning_rate, make_optimizer
from selfalign.training.tracking import Metrics

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass
class TrainingState:
    """Everything a run is at some step."""

    config: RunConfig
    source: DataSource
    folder: Path
    accelerator: Accelerator
    student: SiT
    """The trained model, unwrapped."""
    ema: EMA
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimizer steps done."""
    stopped_by: int | None = None
    """The signal that stopped the run before its last step."""
    metrics: Metrics | None = field(default=None, repr=False)


class Monitor(Protocol):
    """Something done now and then, in the main process, with the state of a run."""

    @property
    def every(self) -> int:
        """Steps between calls; 0: only at the end."""
        ...

    def __call__(self, state: TrainingState) -> None:
        """Look at the run; must not change it."""
        ...


Progress = Callable[[TrainingState, dict[str, float]], None]
"""Told of the values of each logged step."""


def train(
    config: RunConfig,
    source: DataSource,
    folder: Path,
    accelerator: Accelerator,
    *,
    checkpoint: Path | None = None,
    monitors: Sequence[Monitor] = (),
    progress: Progress = lambda state, values: None,
) -> TrainingState:
    """Train a model, from the start or from a checkpoint, until the last step or a stop signal.

    Whatever happens at step s is a function of the config and s; a run's state is therefore its step,
    weights, EMA and optimizer, and resuming changes nothing.

    Args:
        config: a resolved tree.
        source: the data.
        folder: the run's folder, which exists.
        accelerator: from `make_accelerator`.
        checkpoint: where to go on from; None starts anew.
        monitors: called when their step has come, and at the end.
        progress: told of every logged step.

    Raises:
        UserError: the loss is no longer finite, or a file cannot be read or written.
    """
    training = config.training
    shares = accelerator.num_processes * training.gradient_accumulation
    student = SiT.from_config(config).to(accelerator.device)
    ema = EMA(student, training.ema_decay, training.ema_warmup)
    optimizer = make_optimizer(training, student)
    state = TrainingState(config, source, folder, accelerator, student, ema, optimizer)
    if checkpoint is not None:
        with together(accelerator):
            _restore(state, checkpoint)
    take_step = TrainingStep(config, accelerator, student, ema, optimizer)
    state.metrics = Metrics(folder, accelerator, state.step)

    first_step = state.step
    batches = training_batches(
        source.train,
        seed=config.seed,
        batch_size=training.batch_size // shares,
        first=first_step * training.gradient_accumulation,
        last=training.steps * training.gradient_accumulation,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=config.data.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    student.train()
    started, logged_step = time.perf_counter(), first_step
    with _stop_signals() as signals:
        while state.step < training.steps and state.stopped_by is None:
            step = state.step
            micro_batches = []
            for x0, labels in itertools.islice(batches, training.gradient_accumulation):
                device = accelerator.device
                micro_batches.append(
                    (x0.to(device, non_blocking=True), labels.to(device, non_blocking=True))
                )
            losses, norm = take_step(step, micro_batches)
            state.step = step + 1

            if state.step % training.log_every == 0 or state.step == training.steps:
                values = _values(accelerator, losses, norm)
                values["learning_rate"] = learning_rate(training, step)
                now = time.perf_counter()
                seconds = (now - started) / (state.step - logged_step)
                values["samples_per_second"] = training.batch_size / seconds
                state.metrics.write(state.step, values)
                progress(state, values)
                started, logged_step = time.perf_counter(), state.step
                state.stopped_by = _agree(accelerator, signals)
            elif accelerator.num_processes == 1:
                state.stopped_by = _agree(accelerator, signals)
            before = time.perf_counter()
            _visit(state, monitors)
            started += time.perf_counter() - before  # monitors do not count as training time
    if state.stopped_by is not None and state.step < training.steps:
        with together(accelerator):
            _save(state)
    state.metrics.close()
    return state


def make_accelerator(training: TrainingConfig, folder: Path) -> Accelerator:
    """The device, processes and precision of a run.

    Raises:
        UserError: the device lacks the precision, or the batch does not divide over the processes.
    """
    # accelerate keeps the precision of a process's first run; every run has its own.
    AcceleratorState._reset_state()
    refusal = (
        f"training.precision is {training.precision!r}: not on this device; fp32 runs everywhere"
    )
    try:
        accelerator = Accelerator(
            mixed_precision=PRECISIONS[training.precision],
            log_with=list(training.trackers) or None,
            project_config=ProjectConfiguration(
                str(folder), logging_dir=str(folder / "tensorboard")
            ),
            # Buffers are constants; processes would send them to each other at every step.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise UserError(f"{refusal} ({error})") from error
    if training.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(f"{refusal}, bf16 on CPUs too")  # accelerate would quietly run float32
    shares = accelerator.num_processes * training.gradient_accumulation
    if training.batch_size % shares:
        raise UserError(
            f"training.batch_size is {training.batch_size}: must be a multiple of {shares} "
            f"({accelerator.num_processes} processes × {training.gradient_accumulation} micro-batches)"
        )
    return accelerator


def _restore(state: TrainingState, checkpoint: Path) -> None:
    load_weights(checkpoint, state.student, "model.safetensors")
    load_weights(checkpoint, state.ema.model, "ema.safetensors")
    load_optimizer(checkpoint, state.student, state.optimizer)
    saved = load_state(checkpoint)
    state.step = saved["step"]
    if state.accelerator.scaler is not None and saved.get("scaler"):
        state.accelerator.scaler.load_state_dict(saved["scaler"])


def _save(state: TrainingState) -> None:
    state.accelerator.wait_for_everyone()
    if state.accelerator.is_main_process:
        scaler = state.accelerator.scaler
        save_checkpoint(
            state.folder / "checkpoints",
            state.step,
            state.student,
            state.ema.model,
            state.optimizer,
            {"scaler": scaler.state_dict() if scaler is not None else None},
            state.config.training.keep_checkpoints,
        )


def _visit(state: TrainingState, monitors: Sequence[Monitor]) -> None:
    """Call monitors and checkpoint where their step has come.

    The checkpoint comes last: a run that is killed in between repeats what its monitors had not
    finished, and leaves no gap in the curves. One that fails does not cost the checkpoint.
    """
    training = state.config.training
    finished = state.step == training.steps

    def due(every: int) -> bool:
        return finished or (every > 0 and state.step % every == 0)

    monitors = [monitor for monitor in monitors if due(monitor.every)]
    save = due(training.checkpoint_every)
    if not monitors and not save:
        return
    with together(state.accelerator):
        try:
            if state.accelerator.is_main_process:
                for monitor in monitors:
                    monitor(state)
        finally:
            if save:
                _save(state)


def _values(accelerator: Accelerator, losses: list[Losses], norm: torch.Tensor) -> dict[str, float]:
    """The step's losses, averaged over micro-batches and processes: the one place that waits."""
    terms = [torch.stack([x.total, x.denoising.mean(), x.alignment]) for x in losses]
    mean = accelerator.reduce(torch.stack(terms).mean(dim=0).detach(), "mean")
    total, denoising, alignment = mean.tolist()
    return {
        "loss": total,
        "denoising_loss": denoising,
        "alignment_loss": alignment,
        "gradient_norm": float(norm),
    }


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Note the first Ctrl-C or SIGTERM instead of dying of it; a second one is immediate."""
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    # Only the main thread may change how signals are handled.
    in_main = threading.current_thread() is threading.main_thread()
    watched = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    previous = {number: signal.signal(number, note) for number in watched}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _agree(accelerator: Accelerator, signals: list[int]) -> int | None:
    """The signal to stop for, if any process was sent one; all processes stop at the same step."""
    own = signals[0] if signals else 0
    if accelerator.num_processes == 1:
        return own or None
    return int(accelerator.gather(torch.tensor([own], device=accelerator.device)).max()) or None

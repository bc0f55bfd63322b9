"""The training loop, top to bottom."""

import copy
import itertools
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from accelerate import Accelerator

from selfalign.config import ResolvedConfig
from selfalign.curriculums import Learner
from selfalign.data.batch import beside
from selfalign.data.source import DataSource, Features
from selfalign.data.stream import BatchOfMicroStep, training_batches
from selfalign.errors import Interrupted, UserError
from selfalign.network import Backbone
from selfalign.objective import Losses
from selfalign.processes import together
from selfalign.records import read_json
from selfalign.signals import StopSignals, stop_signals
from selfalign.student import build_student
from selfalign.training.checkpoint import (
    WEIGHTS,
    CheckpointState,
    checkpoint_tensors,
    is_monitored,
    load_optimizer,
    load_weights,
    mark_monitored,
    require_room_for_checkpoint,
    save_checkpoint,
    weights_file,
)
from selfalign.training.ema import EMA
from selfalign.training.finite import explain
from selfalign.training.heldout import heldout_loss
from selfalign.training.sharded_checkpoint import ShardedCheckpoints
from selfalign.training.sharding import is_sharded, shard, whole_copy
from selfalign.training.starting import load_start, read_start
from selfalign.training.step import TrainingStep, learning_rate, make_optimizer
from selfalign.training.tracking import Metrics


@dataclass
class TrainingState:
    """Everything a run is at some step."""

    config: ResolvedConfig
    source: DataSource
    folder: Path
    accelerator: Accelerator
    student: Backbone
    """The trained model, unwrapped."""
    ema: EMA[Backbone]
    optimizer: torch.optim.Optimizer
    averages: dict[str, EMA[Backbone]] = field(default_factory=dict)
    """Further ones, by their file in checkpoints."""
    step: int = 0
    """Optimizer steps done."""
    saved_step: int | None = None
    """That of the last checkpoint."""
    monitored: bool = True
    """Whether the monitors of the step that a run goes on from are through."""
    skipped: int = 0
    """Steps left out because they were not finite."""
    learner: Learner | None = None
    """What chooses how batches are grouped, where that is learnt."""
    stopped_by: int | None = None
    """The signal that stopped the run before its last step."""
    metrics: Metrics | None = field(default=None, repr=False)
    background: ShardedCheckpoints | None = field(default=None, repr=False)
    """What writes the checkpoints of a sharded run."""


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


def begin(
    config: ResolvedConfig,
    source: DataSource,
    folder: Path,
    accelerator: Accelerator,
    checkpoint: Path | None = None,
) -> TrainingState:
    """The state that training starts from, or goes on from; nothing is written.

    Args:
        config: a resolved tree.
        source: the data.
        folder: the run's folder.
        accelerator: from `make_accelerator`.
        checkpoint: where to go on from; None starts anew.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    training = config.training
    sharded = is_sharded(training, accelerator)
    student = build_student(config)
    if not sharded:  # shards go to the device one by one
        student.to(accelerator.device)
    student.describe(source.class_names)
    decays = training.ema_decays
    kept = [EMA(student, decay, training.ema_warmup) for decay in decays]
    if checkpoint is None and training.start_from is not None:
        with together(accelerator):
            start = read_start(Path(training.start_from), training.start_weights)
            told = load_start(start, student, [each.model for each in kept])
        if told and accelerator.is_main_process:
            warnings.warn(f"weights of {training.start_from}: {'; '.join(told)}", stacklevel=2)
    if sharded:
        for model in (student, *(each.model for each in kept)):
            shard(model, training, accelerator)
        for each in kept:
            each.follow()
    ema, *further = kept
    averages = {weights_file(f"ema:{each.decay!r}", decays): each for each in further}
    optimizer = make_optimizer(config, student)
    learner = config.curriculum.learner(config)
    state = TrainingState(
        config, source, folder, accelerator, student, ema, optimizer, averages, learner=learner
    )
    if sharded:
        state.background = ShardedCheckpoints(accelerator)
    if checkpoint is not None:
        with together(accelerator):
            _restore(state, checkpoint)
    return state


def train(
    state: TrainingState,
    monitors: Sequence[Monitor] = (),
    progress: Progress = lambda state, values: None,
) -> TrainingState:
    """Train until the last step or a stop signal.

    Whatever happens at step s is a function of the config and s; a run's state is therefore its step,
    weights, EMA and optimizer, and resuming changes nothing.

    Args:
        state: from `begin`; it is changed.
        monitors: called when their step has come, and at the end.
        progress: told of every logged step.

    Raises:
        UserError: the loss is no longer finite, or a file cannot be read or written.
    """
    config, source, accelerator = state.config, state.source, state.accelerator
    training, student = config.training, state.student
    shares = accelerator.num_processes * training.gradient_accumulation
    take_step = TrainingStep(
        config,
        accelerator,
        student,
        state.ema,
        state.optimizer,
        state.skipped,
        tuple(state.averages.values()),
        state.learner,
    )
    with together(accelerator):
        if accelerator.is_main_process and not _is_finished(state):
            averages = (state.ema, *state.averages.values())
            models = (student, *(average.model for average in averages))
            require_room_for_checkpoint(state.folder / "checkpoints", *models)
        state.metrics = Metrics(state.folder, accelerator, state.step, state.monitored, config)
    failed: set[type] = set()
    if not state.monitored:
        _watch(state, monitors, failed)

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
        features=_stored_features(config, source),
    )
    student.train()
    started, logged_step = time.perf_counter(), first_step
    with _noting_signals() as heard:
        while state.step < training.steps and state.stopped_by is None:
            step = state.step
            micro_batches = []
            try:
                for batch in itertools.islice(batches, training.gradient_accumulation):
                    micro_batches.append(beside(accelerator.device, batch))
            except UserError:
                _save_before_ending(state, take_step)
                raise
            losses, norm = take_step(step, micro_batches)
            state.step = step + 1

            if state.step % training.log_every == 0 or state.step == training.steps:
                values = _values(accelerator, losses, norm)
                _require_finite(state, take_step)
                if state.skipped:
                    values["skipped_steps"] = state.skipped
                values["learning_rate"] = learning_rate(training, step)
                now = time.perf_counter()
                seconds = (now - started) / (state.step - logged_step)
                values["samples_per_second"] = training.batch_size / seconds
                state.metrics.write(state.step, values)
                progress(state, values)
                started, logged_step = time.perf_counter(), state.step
                state.stopped_by = _agreed_stop_signal(accelerator, heard)
            elif accelerator.num_processes == 1:
                state.stopped_by = _agreed_stop_signal(accelerator, heard)
            before = time.perf_counter()
            _teach(state)
            _run_monitors(state, monitors, failed, take_step)
            started += time.perf_counter() - before  # monitors do not count as training time
    if state.background is not None:
        state.background.finish()  # before accelerate ends the group
    state.metrics.close()
    return state


def _teach(state: TrainingState) -> None:
    """Tell a learned curriculum what the last steps brought, where they are over; all processes agree."""
    learner = state.learner
    if learner is None or state.step % learner.every != 0:
        return
    state.student.eval()
    try:
        loss = heldout_loss(
            state.student, state.source.train, state.config.flow.path, learner.pairs
        ).overall
    finally:
        state.student.train()
    shared = torch.tensor(loss, dtype=torch.float32, device=state.accelerator.device)
    learner.observe(float(state.accelerator.reduce(shared, "mean")))


def _stored_features(config: ResolvedConfig, source: DataSource) -> dict[str, Features]:
    """What the targets want to come with every batch."""
    targets = config.used_targets().values()
    return {
        name: held for target in targets for name, held in target.stored(config, source).items()
    }


def _restore(state: TrainingState, checkpoint: Path) -> None:
    saved = read_json(checkpoint / "state.json", CheckpointState)
    optimizer = state.config.training.optimizer
    if saved.optimizer not in (None, optimizer):
        raise UserError(
            f"training.optimizer is {optimizer!r}: {checkpoint} is of {saved.optimizer!r}, and is gone on "
            "with by that"
        )
    load_weights(checkpoint, state.student, WEIGHTS["raw"])
    load_weights(checkpoint, state.ema.model, WEIGHTS["ema"])
    for file, average in state.averages.items():
        load_weights(checkpoint, average.model, file)
    if saved.step:  # imported weights come without
        load_optimizer(checkpoint, state.student, state.optimizer)
    state.step = state.saved_step = saved.step
    state.skipped = saved.skipped
    if state.learner is not None:
        state.learner.load(saved.curriculum or {})
    state.monitored = is_monitored(checkpoint)
    if state.accelerator.scaler is not None and saved.scaler:
        state.accelerator.scaler.load_state_dict(saved.scaler)


def _save(state: TrainingState) -> None:
    state.accelerator.wait_for_everyone()
    folder, keep = state.folder / "checkpoints", state.config.training.keep_checkpoints
    scaler = state.accelerator.scaler
    about = CheckpointState(
        state.step,
        scaler.state_dict() if scaler is not None else None,
        state.skipped,
        state.config.training.optimizer,
        None if state.learner is None else dict(state.learner.state()),
    )
    averages = {file: average.model for file, average in state.averages.items()}
    parts = state.student, state.ema.model, state.optimizer
    if state.background is not None:
        state.background.save(folder, checkpoint_tensors(*parts, averages), about, keep)
    elif state.accelerator.is_main_process:
        save_checkpoint(folder, *parts, about, keep, averages)
    state.saved_step = state.step


def _save_before_ending(state: TrainingState, take_step: TrainingStep) -> None:
    """Keep what has been done where the data cannot be read on: the run goes on once it is repaired.

    Of several processes the one that cannot read cannot agree with the others on a step to save.
    """
    if state.accelerator.num_processes == 1 and state.step > (state.saved_step or 0):
        _require_finite(state, take_step)
        _save(state)


def _run_monitors(
    state: TrainingState, monitors: Sequence[Monitor], failed: set[type], take_step: TrainingStep
) -> None:
    """Checkpoint, and call monitors, where their step has come.

    The checkpoint comes first, also before the first monitors of a run: whatever they do, it is there.
    A run that is killed in between calls them when it is resumed.
    """
    due, save = _due(state, monitors), _saves(state, monitors)
    if save:
        _require_finite(state, take_step)
        with together(state.accelerator):
            _save(state)
    if due and state.stopped_by is not None and not _is_finished(state):
        return  # there may be little time left: they are called when the run goes on
    if due or save:
        _watch(state, monitors, failed)


def _watch(state: TrainingState, monitors: Sequence[Monitor], failed: set[type]) -> None:
    """Call the monitors whose step has come. One that fails costs what it was to show, not the run.

    Args:
        state: the run's.
        monitors: all of them.
        failed: kinds of monitors that have failed before, and were warned of.
    """
    due = _due(state, monitors)
    seen = _as_whole(state) if due and state.background is not None else state
    with together(state.accelerator):
        for monitor in due if state.accelerator.is_main_process else ():
            try:
                with _uncompiled(state.config):
                    monitor(seen)
            except (Exception, SystemExit) as error:  # noqa: BLE001 – also of other people's code
                if type(monitor) not in failed:
                    failed.add(type(monitor))
                    warnings.warn(
                        f"{type(monitor).__name__} failed at step {state.step}, and training goes on: "
                        f"{type(error).__name__}: {error}",
                        stacklevel=2,
                    )
        if state.background is not None and (due or _is_finished(state)):
            state.background.finish()
        if state.accelerator.is_main_process and state.saved_step == state.step:
            mark_monitored(state.folder / "checkpoints", state.step)


def _uncompiled(config: ResolvedConfig) -> AbstractContextManager[object]:
    """A block in which nothing is compiled: monitors run models a few times, at shapes of their own."""
    if not config.training.compile:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _as_whole(state: TrainingState) -> TrainingState:
    """A sharded state with whole models in the main process: monitors are called there alone."""
    config, accelerator = state.config, state.accelerator
    ema = copy.copy(state.ema)
    captions = state.source.class_names
    student, ema.model = (
        whole_copy(model, config, captions, accelerator)
        for model in (state.student, state.ema.model)
    )
    return replace(state, student=student, ema=ema)


def _due(state: TrainingState, monitors: Sequence[Monitor]) -> list[Monitor]:
    def is_due(every: int) -> bool:
        return _is_finished(state) or (every > 0 and state.step % every == 0)

    return [monitor for monitor in monitors if is_due(monitor.every)]


def _saves(state: TrainingState, monitors: Sequence[Monitor]) -> bool:
    """Whether the step that has been made is followed by a checkpoint."""
    every = state.config.training.checkpoint_every
    return (
        _is_finished(state)
        or state.stopped_by is not None
        or (every > 0 and state.step % every == 0)
        or (state.saved_step is None and bool(_due(state, monitors)))
    )


def _is_finished(state: TrainingState) -> bool:
    return state.step >= state.config.training.steps


def _require_finite(state: TrainingState, take_step: TrainingStep) -> None:
    """Stop where steps have not been finite; all processes do, at the same step."""
    config, accelerator = state.config, state.accelerator
    state.skipped = take_step.finite.skipped()
    first = take_step.finite.broken_since(state.step)
    if first is None:
        return
    shares = accelerator.num_processes * config.training.gradient_accumulation
    with together(accelerator):
        if accelerator.is_main_process:
            raise explain(
                first,
                config.training,
                [
                    BatchOfMicroStep(
                        state.source.train,
                        config.seed,
                        config.training.batch_size // shares,
                        rank,
                        accelerator.num_processes,
                    )
                    for rank in range(accelerator.num_processes)
                ],
            )


def _values(accelerator: Accelerator, losses: list[Losses], norm: torch.Tensor) -> dict[str, float]:
    """The step's losses, averaged over micro-batches and processes: the one place that waits."""
    terms = [torch.stack([x.total, *x.means().values()]) for x in losses]
    mean = accelerator.reduce(torch.stack(terms).mean(dim=0).detach(), "mean")
    names = ("loss", *(f"{name}_loss" for name in losses[0].terms))
    return dict(zip(names, mean.tolist(), strict=True)) | {"gradient_norm": float(norm)}


@contextmanager
def _noting_signals() -> Iterator[StopSignals]:
    """Note the first signal to stop instead of dying of it; a second one is immediate."""
    heard = StopSignals()

    def note(number: int, frame: FrameType | None) -> None:
        if heard.hear(number) == "another":
            raise Interrupted(number)

    # Only the main thread may change how signals are handled.
    in_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, note) for number in stop_signals() if in_main}
    try:
        yield heard
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _agreed_stop_signal(accelerator: Accelerator, heard: StopSignals) -> int | None:
    """The signal to stop for, if any process was sent one; all processes stop at the same step."""
    if accelerator.num_processes == 1:
        return heard.first
    own = heard.first or 0
    return int(accelerator.gather(torch.tensor([own], device=accelerator.device)).max()) or None

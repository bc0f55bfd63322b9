"""Runs that are started, and runs that are gone on with."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator

from selfalign.config import ResolvedConfig, RunConfig, complete, override, resolve
from selfalign.data.datasets import open_data
from selfalign.data.source import DataSource
from selfalign.errors import UserError
from selfalign.processes import main_process_first, together
from selfalign.runs.data import check_data, open_recorded
from selfalign.runs.folder import (
    CHECKPOINTS,
    empty,
    inherit_origin,
    missing_folders,
    read_record,
    recorded_data,
    refuse_used,
    remove_empty,
    sole_writer,
    write_config,
)
from selfalign.runs.monitors import default_monitors
from selfalign.training.accelerator import make_accelerator
from selfalign.training.checkpoint import (
    FILES,
    checkpoints,
    choose_checkpoint,
    is_monitored,
    prune,
    rewind,
    step_of,
    weights_file,
)
from selfalign.training.loop import (
    Monitor,
    Progress,
    TrainingState,
    begin,
    train,
)
from selfalign.training.tracking import read_metrics

Found = Callable[[DataSource], None]
"""Told of the data once it is open, on the main process."""


def start_run(
    config: RunConfig,
    folder: Path,
    progress: Progress,
    monitors: Sequence[Monitor] | None = None,
    found: Found | None = None,
) -> TrainingState:
    """Train a new run in an empty or missing folder.

    Args:
        config: a tree that may leave to the data what the data determines.
        folder: where the run goes. Nothing stays in it if the run fails before its first step.
        progress: told of every logged step.
        monitors: what is done now and then; None for `default_monitors`.
        found: told of the data once it is open.

    Raises:
        UserError: settings, data or folder do not allow it.
    """
    accelerator = make_accelerator(config.training, folder)
    _refuse_used(folder, accelerator)
    source = main_process_first(accelerator, lambda: open_data(config.data))
    _tell(found, source, accelerator)
    with together(accelerator):
        _check_start(config)
        resolved = _resolve(config, source, accelerator)
    resolved = main_process_first(accelerator, lambda: complete(resolved, source))
    made = missing_folders(folder)
    try:
        with sole_writer(folder, accelerator):
            _refuse_used(folder, accelerator)
            state = begin(resolved, source, folder, accelerator)
            try:
                with together(accelerator):
                    if accelerator.is_main_process:
                        write_config(folder, resolved, source)
                        inherit_origin(resolved.training.start_from, folder)
                return train(state, _monitors(config, monitors), progress)
            except BaseException:
                if accelerator.is_main_process and state.step == 0:
                    if state.metrics is not None:
                        state.metrics.close()  # trackers write later on, and into a folder of their own
                    empty(folder)
                raise
    finally:
        remove_empty(made)


def resume_run(
    folder: Path,
    steps: int | None,
    progress: Progress,
    monitors: Sequence[Monitor] | None = None,
    found: Found | None = None,
    *,
    step: int | None = None,
    data_root: str | None = None,
    accept_changes: bool = False,
    gradient_accumulation: int | None = None,
    sharding: str | None = None,
) -> TrainingState | None:
    """Go on with a run from a checkpoint, perhaps to another last step.

    One that has no checkpoint yet starts anew. Whatever fails before the training goes on leaves the
    folder as it is.

    Args:
        folder: of the run.
        steps: the new last step; None keeps it.
        progress, monitors, found: as for `start_run`.
        step: the checkpoint to go on from, after which all is dropped; None for the last one.
        data_root: where the data is now; None: where it was.
        accept_changes: whether to go on without the images that are gone; the rest keeps its order.
        gradient_accumulation, sharding: how the batch and the model are now shared; None: as they were. The
            number of processes may be another too.

    Returns:
        The state at the end; None if there was nothing left to do.

    Raises:
        UserError: there is no run, its checkpoint is damaged, or the data has changed.
    """
    record = read_record(folder)
    changes = {
        "training.steps": steps,
        "training.gradient_accumulation": gradient_accumulation,
        "training.sharding": sharding,
        "data.root": data_root,
    }
    config = override(record.config, {k: v for k, v in changes.items() if v is not None})
    accelerator = make_accelerator(config.training, folder)
    with sole_writer(folder, accelerator):
        with together(accelerator):
            checkpoint = _checkpoint(folder, step, config.training.ema_decays)
            read_metrics(folder, most=1)  # before anything is written, whether it can be read
            done = 0 if checkpoint is None else step_of(checkpoint)
            if done > config.training.steps:
                raise UserError(
                    f"training.steps is {config.training.steps}: {done} steps of {folder} are done "
                    "already; allowed is a larger number"
                )
            all_done = done == config.training.steps
            finished = checkpoint is not None and all_done and is_monitored(checkpoint)
        if finished:
            return None
        recorded = recorded_data(folder, record.fingerprint)
        source = main_process_first(accelerator, lambda: open_recorded(config.data, recorded))
        _tell(found, source, accelerator)
        with together(accelerator):
            told = check_data(folder, recorded, source, accept_changes, "start a new run")
            if told and accelerator.is_main_process:
                warnings.warn(f"{told}; the run goes on with what is there", stacklevel=2)
            resolved = _resolve(config, source, accelerator)
        resolved = main_process_first(accelerator, lambda: complete(resolved, source))
        state = begin(resolved, source, folder, accelerator, checkpoint)
        with together(accelerator):
            if accelerator.is_main_process:
                write_config(folder, resolved, source)
                if step is not None and checkpoint is not None:
                    rewind(folder / CHECKPOINTS, checkpoint)
                if checkpoint is not None:  # what an earlier process did not come to
                    prune(checkpoint, resolved.training.keep_checkpoints)
        return train(state, _monitors(config, monitors), progress)


def _resolve(config: RunConfig, source: DataSource, accelerator: Accelerator) -> ResolvedConfig:
    """The tree with what the data determines; of a run that goes on it has to be what it was."""
    config.model.require(
        config.backbone.trains,
        "backbone",
        "it is sampled from; allowed for training is another, as sit",
    )
    return resolve(
        config, source.channels, source.image_size, source.num_classes, accelerator.num_processes
    )


def _check_start(config: RunConfig) -> None:
    """Refuse to start from a run whose model is of another kind, though its tensors may fit."""
    start = Path(config.training.start_from or "")
    if config.training.start_from is not None and (start / "config.json").is_file():
        config.training.require(
            read_record(start).config.backbone.trains,
            "start_from",
            "it predicts noise at diffusion steps; allowed are models that predict velocities",
        )


def _tell(found: Found | None, source: DataSource, accelerator: Accelerator) -> None:
    if found is not None and accelerator.is_main_process:
        found(source)


def _refuse_used(folder: Path, accelerator: Accelerator) -> None:
    with together(accelerator):
        if accelerator.is_main_process:
            refuse_used(folder)


def _checkpoint(folder: Path, step: int | None, decays: Sequence[float]) -> Path | None:
    """Where to go on from; None where nothing has been saved yet.

    Raises:
        UserError: checkpoints are out of reach, on a disk that is not mounted for one, or damaged.
    """
    place = folder / CHECKPOINTS
    if os.path.lexists(place) and not place.is_dir():
        raise UserError(
            f"{place} is no folder, or a link that leads nowhere: nothing is begun anew"
        )
    if step is None and not os.path.lexists(place / "latest") and not checkpoints(place):
        return None
    averages = [weights_file(f"ema:{decay!r}", decays) for decay in decays]
    return choose_checkpoint(place, step, list(dict.fromkeys([*FILES, *averages])))


def _monitors(config: RunConfig, monitors: Sequence[Monitor] | None) -> Sequence[Monitor]:
    return default_monitors(config.training) if monitors is None else monitors

"""A run folder from start to end: new, resumed, and loaded again for sampling.

Puts together what stands side by side below: data, training, the monitors, sampling.
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

import selfalign
from selfalign.config import (
    RunConfig,
    TrainingConfig,
    config_from_dict,
    config_to_dict,
    override,
    resolve,
)
from selfalign.data import DataSource, open_data
from selfalign.errors import UserError
from selfalign.models.sit import SiT
from selfalign.processes import main_process_first, together
from selfalign.sampling.generate import SamplingConfig, generate, to_uint8
from selfalign.sampling.pictures import column_labels, draw_curves, draw_grids
from selfalign.training.checkpoint import latest_checkpoint, load_state, load_weights
from selfalign.training.heldout import heldout_loss
from selfalign.training.loop import (
    Monitor,
    Progress,
    TrainingState,
    make_accelerator,
    train,
)
from selfalign.training.tracking import read_metrics

GRID_ROWS = 6
GRID_GUIDANCE = 2.0
GRID_STEPS = 25


def start_run(
    config: RunConfig,
    folder: Path,
    progress: Progress,
    monitors: Sequence[Monitor] | None = None,
) -> TrainingState:
    """Train a new run in an empty or missing folder.

    Args:
        config: a tree that may leave to the data what the data determines.
        folder: where the run goes.
        progress: told of every logged step.
        monitors: what is done now and then; None for `default_monitors`.

    Raises:
        UserError: settings, data or folder do not allow it; nothing has been written.
    """
    accelerator = make_accelerator(config.training, folder)
    with together(accelerator):
        if accelerator.is_main_process:
            _refuse_used(folder)
    source = main_process_first(accelerator, lambda: open_data(config.data))
    with together(accelerator):
        config = resolve(
            config,
            source.channels,
            source.image_size,
            source.num_classes,
            accelerator.num_processes,
        )
        if accelerator.is_main_process:
            write_config(folder, config, source)
    return _train(config, source, folder, accelerator, None, progress, monitors)


def resume_run(
    folder: Path,
    steps: int | None,
    progress: Progress,
    monitors: Sequence[Monitor] | None = None,
) -> TrainingState:
    """Go on with a run from its last checkpoint, perhaps to another last step.

    Args:
        folder: of the run.
        steps: the new last step; None keeps it.
        progress, monitors: as for `start_run`.

    Raises:
        UserError: there is no run or checkpoint, the data has changed, or it is finished.
    """
    config, fingerprint = read_config(folder)
    if steps is not None:
        config = override(config, {"training.steps": steps})
    accelerator = make_accelerator(config.training, folder)
    with together(accelerator):
        checkpoint = latest_checkpoint(folder / "checkpoints")
        done = load_state(checkpoint)["step"]
        if done >= config.training.steps:
            raise UserError(
                f"{folder} is finished: {done} of {config.training.steps} steps are done; "
                "--training.steps takes a larger number"
            )
    source = main_process_first(accelerator, lambda: open_data(config.data))
    with together(accelerator):
        if source.fingerprint != fingerprint:
            raise UserError(
                f"the data of {folder} has changed since it was started (fingerprint "
                f"{source.fingerprint} instead of {fingerprint}); start a new run"
            )
        config = resolve(config, processes=accelerator.num_processes)
        if accelerator.is_main_process:
            write_config(folder, config, source)
    return _train(config, source, folder, accelerator, checkpoint, progress, monitors)


def default_monitors(training: TrainingConfig) -> Sequence[Monitor]:
    """Held-out losses, sample grids and curves, as often as the settings say."""
    return (
        HeldOutMonitor(training.evaluate_every),
        GridMonitor(training.sample_every),
        CurvesMonitor(training.evaluate_every),
    )


def _refuse_used(folder: Path) -> None:
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds a run already: choose another --out, or go on with "
            f"`selfalign train --resume {folder}`"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out is {str(folder)!r}: must be a new or an empty folder")


def _train(
    config: RunConfig,
    source: DataSource,
    folder: Path,
    accelerator: Accelerator,
    checkpoint: Path | None,
    progress: Progress,
    monitors: Sequence[Monitor] | None,
) -> TrainingState:
    return train(
        config,
        source,
        folder,
        accelerator,
        checkpoint=checkpoint,
        monitors=default_monitors(config.training) if monitors is None else monitors,
        progress=progress,
    )


@dataclass(frozen=True)
class HeldOutMonitor:
    """Writes the held-out denoising loss of EMA and raw weights to the metrics."""

    every: int

    def __call__(self, state: TrainingState) -> None:
        """Evaluate both models on the same images, timesteps and noise."""
        values: dict[str, Any] = {}
        state.student.eval()
        for name, model in (("ema", state.ema.model), ("raw", state.student)):
            loss = heldout_loss(
                model,
                state.source.heldout,
                state.config.flow.path,
                state.config.training.heldout_samples,
            )
            values[f"heldout_{name}"] = loss.overall
            values[f"heldout_{name}_by_timestep"] = list(loss.by_timestep)
        state.student.train()
        if state.metrics is not None:
            state.metrics.write(state.step, values)


@dataclass(frozen=True)
class GridMonitor:
    """Saves a grid of EMA samples, unguided and guided, always from the same noise and labels."""

    every: int

    def __call__(self, state: TrainingState) -> None:
        """Write samples/step_*.png; a missing decoder costs the picture, not the run."""
        try:
            draw_sample_grid(
                state.folder / "samples" / f"step_{state.step:08d}.png",
                state.ema.model,
                state.config,
                state.source,
                title=f"EMA weights after {state.step} steps",
            )
        except UserError as error:
            warnings.warn(f"no sample grid at step {state.step}: {error}", stacklevel=2)


@dataclass(frozen=True)
class CurvesMonitor:
    """Saves the run's curves."""

    every: int

    def __call__(self, state: TrainingState) -> None:
        """Write curves.png."""
        draw_curves(state.folder / "curves.png", read_metrics(state.folder), state.folder.name)


def draw_sample_grid(
    path: Path, model: SiT, config: RunConfig, source: DataSource, title: str
) -> None:
    """Save a grid with a class per column: unguided, and guided where the model allows it."""
    labels = column_labels(model.num_classes)
    columns = [source.class_names[k] for k in labels] if labels else [""] * 8
    scales = [1.0]
    if labels and config.views.class_dropout > 0:
        scales.append(GRID_GUIDANCE)
    panels = {}
    for scale in scales:
        sampling = SamplingConfig(solver="heun", steps=GRID_STEPS, guidance_scale=scale)
        count = GRID_ROWS * len(columns)
        batches = generate(
            model, config.flow.path, sampling, count, batch_size=count, labels=labels
        )
        images = torch.cat([source.decode(batch.images) for batch in batches])
        name = "unguided" if scale == 1 else f"guidance {scale:g}"
        panels[name] = to_uint8(images).cpu()
    draw_grids(path, panels, columns, title)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what it was trained with."""

    folder: Path
    config: RunConfig
    model: SiT
    step: int

    def decode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """From the model's space to images in [-1, 1]; only latents need their data set for it."""
        return self._decoder(images) if self.config.data.name == "latents" else images

    @functools.cached_property
    def _decoder(self) -> Callable[[Tensor], Tensor]:
        return open_data(self.config.data).decode


def load_run(
    folder: Path, weights: Literal["ema", "raw"] = "ema", device: torch.device | str = "cpu"
) -> LoadedRun:
    """The model of a run's last checkpoint, in eval mode.

    Raises:
        UserError: there is no run or no whole checkpoint.
    """
    config, _ = read_config(folder)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    model = SiT.from_config(config)
    load_weights(checkpoint, model, "ema.safetensors" if weights == "ema" else "model.safetensors")
    model.eval().requires_grad_(False)
    step = load_state(checkpoint)["step"]
    return LoadedRun(folder, config, model.to(device), step)


def write_config(folder: Path, config: RunConfig, source: DataSource) -> None:
    """Write config.json: the resolved tree, the package's version and the data's fingerprint."""
    record = {
        "selfalign_version": selfalign.__version__,
        "data_fingerprint": source.fingerprint,
        "class_names": source.class_names,
        "config": config_to_dict(config),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".config.json.partial"
        partial.write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(folder / "config.json")
    except OSError as error:
        raise UserError(f"--out is {str(folder)!r}: cannot be written ({error})") from error


def read_config(folder: Path) -> tuple[RunConfig, str]:
    """A run's resolved tree, and the fingerprint of its data.

    Raises:
        UserError: the folder is not a run, or its config.json is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is not a run: it holds no config.json")
    try:
        record = json.loads(path.read_text())
        return config_from_dict(record["config"]), record["data_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of a run's classes, by label."""
    return tuple(json.loads((folder / "config.json").read_text())["class_names"])


def sampling_record(run: LoadedRun, sampling: SamplingConfig, **more: Any) -> dict[str, Any]:
    """Every setting that a set of samples depends on, as JSON can hold it."""
    return {
        "run": str(run.folder),
        "step": run.step,
        "selfalign_version": selfalign.__version__,
        **dataclasses.asdict(sampling),
        **more,
    }

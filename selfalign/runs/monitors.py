"""What is looked at while a run goes on: held-out losses, sample grids, curves.

What draws is imported when something is drawn: matplotlib would delay the first step by half a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfalign.config import ResolvedConfig
from selfalign.data.source import DataSource
from selfalign.network import Backbone
from selfalign.sampling.generate import generate
from selfalign.sampling.lengths import draw_lengths
from selfalign.sampling.settings import SamplingConfig
from selfalign.sections import TrainingConfig
from selfalign.training.heldout import heldout_loss
from selfalign.training.loop import Monitor, TrainingState
from selfalign.training.tracking import FOR_CURVES, read_metrics

GRID_ROWS = 6
GRID_GUIDANCE = 2.0
GRID_STEPS = 25
CAPTIONED = 40
"""Images above captions, of a model that reads texts."""


def default_monitors(training: TrainingConfig) -> Sequence[Monitor]:
    """Held-out losses, sample grids and curves, as often as the settings say."""
    return (
        HeldOutMonitor(training.evaluate_every),
        GridMonitor(training.sample_every),
        CurvesMonitor(training.evaluate_every),
    )


@dataclass(frozen=True)
class HeldOutMonitor:
    """Writes the held-out denoising loss of EMA and raw weights to the metrics."""

    every: int

    def __call__(self, state: TrainingState) -> None:
        """Evaluate both models on the same images, timesteps and noise."""
        values: dict[str, Any] = {}
        state.student.eval()
        try:
            for name, model in (("ema", state.ema.model), ("raw", state.student)):
                loss = heldout_loss(
                    model,
                    state.source.heldout,
                    state.config.flow.path,
                    state.config.training.heldout_samples,
                )
                values[f"heldout_{name}"] = loss.overall
                values[f"heldout_{name}_by_timestep"] = list(loss.by_timestep)
        finally:
            state.student.train()
        if state.metrics is not None:
            state.metrics.write(state.step, values)


@dataclass(frozen=True)
class GridMonitor:
    """Saves a grid of EMA samples, unguided and guided, always from the same noise and labels."""

    every: int

    def __call__(self, state: TrainingState) -> None:
        """Write samples/step_*.png."""
        path = state.folder / "samples" / f"step_{state.step:08d}.png"
        draw_sample_grid(
            path,
            state.ema.model,
            state.config,
            state.source,
            title=f"EMA weights after {state.step} steps",
        )
        if state.metrics is not None:
            state.metrics.show_picture(state.step, "samples", path)


@dataclass(frozen=True)
class CurvesMonitor:
    """Saves the run's curves."""

    every: int

    def __call__(self, state: TrainingState) -> None:
        """Write curves.png."""
        from selfalign.sampling.pictures import draw_curves

        path = state.folder / "curves.png"
        draw_curves(path, read_metrics(state.folder, FOR_CURVES), state.folder.name)
        if state.metrics is not None:
            state.metrics.show_picture(state.step, "curves", path)


def draw_sample_grid(
    path: Path, model: Backbone, config: ResolvedConfig, source: DataSource, title: str
) -> None:
    """Save a grid with a class per column: unguided, and guided where the model allows it.

    Of a model that reads texts: images above captions, guided.
    """
    from selfalign.sampling.kinds import draw_captioned, draw_panels
    from selfalign.sampling.pictures import column_labels, column_names

    if model.condition.attends and model.num_classes:
        captions = column_labels(model.num_classes, CAPTIONED) or []
        images = _samples(model, config, source, GRID_GUIDANCE, captions, len(captions))
        names = column_names(captions, source.class_names)
        return draw_captioned(path, images, names, f"{title}, guidance {GRID_GUIDANCE:g}")
    labels = column_labels(model.num_classes)
    columns = column_names(labels, source.class_names) if labels else [""] * 8
    scales = [1.0]
    if labels and config.views.class_dropout > 0:
        scales.append(GRID_GUIDANCE)
    panels = {}
    for scale in scales:
        name = "unguided" if scale == 1 else f"guidance {scale:g}"
        count = GRID_ROWS * len(columns)
        panels[name] = _samples(model, config, source, scale, labels, count)
    draw_panels(path, panels, columns, title)


def _samples(
    model: Backbone,
    config: ResolvedConfig,
    source: DataSource,
    scale: float,
    labels: Sequence[int] | None,
    count: int,
) -> torch.Tensor:
    """Decoded samples, always from the same noise."""
    sampling = SamplingConfig(solver="heun", steps=GRID_STEPS, guidance_scale=scale)
    lengths = None
    if config.padded:
        lengths = draw_lengths(source.train, labels, model.num_classes, sampling.seed, count)
    batches = generate(
        model, config.flow.path, sampling, count, batch_size=count, labels=labels, lengths=lengths
    )
    return torch.cat([source.decode(batch.images) for batch in batches]).cpu()

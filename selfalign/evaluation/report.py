"""What an evaluation says, as JSON and as a picture: samples, their nearest training images, metrics
with errors."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from selfalign.evaluation.estimate import Estimate
from selfalign.sampling.pictures import tile
from selfalign.training.heldout import HeldOutLoss

COLUMNS = 10


AIMS = {
    "inception_score": "higher",
    "precision": "higher",
    "recall": "higher",
    "class_consistency": "higher",
    "memorised_share": "0.05",
    "nearer_than_heldout": "0.5",
}
"""What a perfect model reaches; every other metric is to be low."""
SHARES = AIMS.keys() - {"inception_score"}
"""Metrics between 0 and 1."""


def aim(metric: str) -> str:
    """Which way a metric is better, or the value it should have."""
    return AIMS.get(metric, "lower")


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    folder: Path
    metrics: Mapping[str, Estimate]
    baseline: Mapping[str, Estimate]
    """The same of held-out images, where the reference is a data set: what a perfect model reaches."""
    denoising: Mapping[str, HeldOutLoss]
    """By weights, ema and raw."""
    settings: Mapping[str, Any]
    """Everything the numbers depend on."""
    notes: Sequence[str]
    """What to know before comparing them."""

    def as_json(self) -> dict[str, Any]:
        """What evaluation.json holds."""
        return {
            "metrics": {name: dataclasses.asdict(e) for name, e in self.metrics.items()},
            "heldout_images": {name: dataclasses.asdict(e) for name, e in self.baseline.items()},
            "heldout_denoising_loss": {
                name: dataclasses.asdict(loss) for name, loss in self.denoising.items()
            },
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }


@dataclass(frozen=True)
class NeighbourRow:
    """Samples, and below each its nearest training image."""

    title: str
    samples: UInt8[Tensor, "M C H W"]
    neighbours: UInt8[Tensor, "M C H W"]


def draw_evaluation(
    path: Path,
    samples: UInt8[Tensor, "M C H W"],
    rows: Sequence[NeighbourRow],
    evaluation: Evaluation,
    title: str,
) -> None:
    """Save the picture.

    Args:
        path: its file.
        samples: the grid.
        rows: samples with their nearest training images.
        evaluation: the metrics and losses.
        title: stands above all.
    """
    metrics, denoising = evaluation.metrics, evaluation.denoising
    figure = Figure(figsize=(11, 6.5 if metrics or denoising else 4), dpi=144, layout="constrained")
    figure.suptitle(title, fontsize=10)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.4, 1))[:, 0]
    grids = above.subplots(1, 1 + len(rows), squeeze=False)[0]
    _show(grids[0], tile(samples, COLUMNS), "samples")
    for axis, row in zip(grids[1:], rows, strict=True):
        pairs = torch.stack([row.samples, row.neighbours], dim=1)  # (M, 2, C, H, W)
        columns = max(1, len(pairs) // 2)
        # Two lines of pairs, each sample above its neighbour.
        halves = [
            part for half in pairs.split(columns) for part in half.transpose(0, 1).flatten(0, 1)
        ]
        _show(
            axis, tile(torch.stack(halves), columns), f"{row.title},\nnearest training image below"
        )

    panels = len(metrics) + bool(denoising)
    axes = below.subplots(1, max(1, panels), squeeze=False)[0]
    for axis, (name, estimate) in zip(axes, metrics.items(), strict=False):
        _draw_bars(axis, name, estimate, evaluation.baseline.get(name))
    if denoising:
        for name, loss in denoising.items():
            centres = [(k + 0.5) / len(loss.by_timestep) for k in range(len(loss.by_timestep))]
            axes[-1].errorbar(
                centres,
                loss.by_timestep,
                yerr=loss.by_timestep_standard_errors,
                marker="o",
                markersize=3,
                capsize=2,
                label=name,
            )
        values = [f"{k} {v.overall:.4f} ± {v.standard_error:.2g}" for k, v in denoising.items()]
        axes[-1].set_title("\n".join(["held-out denoising loss", *values]), fontsize=7)
        axes[-1].set_xlabel("t (1 is noise)", fontsize=8)
        axes[-1].legend(fontsize=7)
        axes[-1].tick_params(labelsize=7)
    if not panels:
        axes[0].set_axis_off()
    figure.savefig(path, format="png")


def _draw_bars(axis: Axes, name: str, estimate: Estimate, baseline: Estimate | None) -> None:
    bars = {"samples": estimate} | ({"held-out": baseline} if baseline else {})
    axis.bar(
        list(bars),
        [bar.value for bar in bars.values()],
        yerr=[bar.standard_error for bar in bars.values()],
        color=["C0", "0.7"][: len(bars)],
        capsize=4,
    )
    axis.set_title(
        f"{name}\n{estimate.value:.4g} ± {estimate.standard_error:.2g}\naim: {aim(name)}",
        fontsize=7,
    )
    if name in SHARES:
        axis.set_ylim(0, 1)
    if aim(name) not in ("higher", "lower"):
        axis.axhline(float(aim(name)), color="0.4", linestyle="--", linewidth=1)
    axis.tick_params(labelsize=7)


def _show(axis: Axes, picture: object, title: str) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")  # type: ignore[arg-type]
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()

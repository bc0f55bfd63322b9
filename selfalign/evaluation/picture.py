"""An evaluation as a picture: samples, their nearest training images, metrics with errors."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from selfalign.data.shapes import side_by_side
from selfalign.evaluation.estimate import Estimate
from selfalign.evaluation.metrics import Aim, Evidence
from selfalign.evaluation.neighbours import nearest
from selfalign.evaluation.reference import neighbour_images
from selfalign.evaluation.report import SHOWN, Evaluation, NeighbourRow
from selfalign.sampling.pictures import fitting_columns, tile


def draw_evaluation(
    path: Path,
    samples: UInt8[Tensor, "M C H W"],
    rows: Sequence[NeighbourRow],
    evaluation: Evaluation,
    title: str,
    sides: Sequence[int],
) -> None:
    """Save the picture.

    Args:
        path: its file.
        samples: the grid.
        rows: samples with their nearest training images.
        evaluation: the metrics and losses.
        title: stands above all.
        sides: of the data, empty where it is not known: of videos a few frames are shown beside each other.
    """
    metrics, denoising = evaluation.metrics, evaluation.denoising
    figure = Figure(figsize=(11, 6.5 if metrics or denoising else 4), dpi=144, layout="constrained")
    # Names from outside: no formulas, and whatever letters the file system has.
    plain = title.encode(errors="backslashreplace").decode()
    figure.suptitle(plain, fontsize=10, parse_math=False)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.4, 1))[:, 0]
    grids = above.subplots(1, 1 + len(rows), squeeze=False)[0]
    samples = side_by_side(samples, sides)
    _show(grids[0], tile(samples, fitting_columns(*samples.shape[2:])), "samples")
    for axis, row in zip(grids[1:], rows, strict=True):
        both = (side_by_side(images, sides) for images in (row.samples, row.neighbours))
        pairs = torch.stack([*both], dim=1)  # (M, 2, C, H, W)
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
        _draw_bars(axis, name, estimate, evaluation.baseline.get(name), evaluation.aim(name))
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
    with warnings.catch_warnings(action="ignore"):  # about letters that the font lacks
        figure.savefig(path, format="png")


def _draw_bars(
    axis: Axes, name: str, estimate: Estimate, baseline: Estimate | None, aim: Aim
) -> None:
    bars = {"samples": estimate} | ({"held-out": baseline} if baseline else {})
    axis.bar(
        list(bars),
        [bar.value for bar in bars.values()],
        yerr=[bar.standard_error for bar in bars.values()],
        color=["C0", "0.7"][: len(bars)],
        capsize=4,
    )
    axis.set_title(
        f"{name}\n{estimate.value:.4g} ± {estimate.standard_error:.2g}\naim: {aim.best}",
        fontsize=7,
        parse_math=False,
    )
    if aim.share:
        axis.set_ylim(0, 1)
    if aim.best not in ("higher", "lower"):
        axis.axhline(float(aim.best), color="0.4", linestyle="--", linewidth=1)
    axis.tick_params(labelsize=7)


def _show(axis: Axes, picture: object, title: str) -> None:
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")  # type: ignore[arg-type]
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def nearest_in_features(evidence: Evidence) -> list[NeighbourRow]:
    """The first samples and their nearest reference images, where pixels are too many to compare."""
    samples, reference = evidence.samples, evidence.reference
    features: Float[Tensor, "M D"] | None = evidence.features.get("features")
    if features is None or reference.images is None or reference.features is None:
        return []
    shown = range(min(SHOWN, len(samples)))
    _, indices = nearest(features[: len(shown)], [reference.features])
    numbers = neighbour_images(len(reference.images))[indices]
    title = "first samples, by features"
    return [NeighbourRow(title, samples.read(shown), reference.images.read(numbers.tolist()))]

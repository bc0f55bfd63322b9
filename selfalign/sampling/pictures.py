"""Grids of samples in labelled columns, and the curves of a run."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from PIL import Image
from torch import Tensor

from selfalign.disk import write_whole

matplotlib.use("Agg")
MAX_COLUMNS = 10
NAME_SIZE = 8
"""Of class names, in points."""
FRAME_MS, LAST_FRAME_MS = 60, 1500
SMALLEST_SIDE = 64
"""Smaller images are enlarged in animations, pixel by pixel."""
LONGEST_NAME = 40
"""Letters of a class name that are shown."""


def column_labels(num_classes: int, columns: int = MAX_COLUMNS) -> list[int] | None:
    """A class per column, spread over all classes; None for an unconditional model."""
    if num_classes == 0:
        return None
    columns = min(columns, num_classes)
    return [k * num_classes // columns for k in range(columns)]


def column_names(labels: Sequence[int], class_names: Sequence[str]) -> list[str]:
    """The classes' names; the number of one that has none, as a model may have more than its data."""
    return [class_names[k] if k < len(class_names) else str(k) for k in labels]


def draw_grids(
    path: Path,
    panels: Mapping[str, UInt8[Tensor, "M C H W"]],
    columns: Sequence[str],
    title: str,
) -> None:
    """Save one grid of images per panel, side by side, with a name above every column.

    Args:
        path: the picture's file.
        panels: images by panel title, row by row; M is a multiple of the number of columns.
        columns: names of the columns.
        title: stands above all.
    """
    count = len(columns)
    first = next(iter(panels.values()))
    rows, side = len(first) // count, 0.5
    words = [shown(name, LONGEST_NAME) for name in columns]
    widest = max(map(_width, words))
    # Names that are wider than their column lean over it, and over the last one into room of their own.
    above, beside = max(0.2, 0.75 * widest), max(0.0, 0.65 * widest - side)
    height = rows * side * first.shape[2] / first.shape[3] + 0.8 + above
    size = (len(panels) * (count * side + beside) + 0.4, height)
    figure = Figure(figsize=(max(4.0, size[0]), size[1]), dpi=144, layout="constrained")
    figure.suptitle(shown(title), fontsize=9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, images) in zip(axes, panels.items(), strict=True):
        axis.imshow(tile(images, count), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        width = images.shape[3] + 1
        places = [width * (k + 0.5) for k in range(count)]
        leaning = widest > side
        turned = {"rotation": 50, "ha": "left", "rotation_mode": "anchor"} if leaning else {}
        axis.xaxis.tick_top()
        axis.set_xticks(places, words, fontsize=NAME_SIZE, **turned)
        axis.set_yticks([])
        axis.tick_params(length=0)
        axis.set_title(name, fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
    save(path, figure)


def shown(text: str, most: int = 80) -> str:
    """Text as one short line that matplotlib shows as it is: names of files may hold anything."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= most else line[: most - 1] + "…"
    return line.replace("$", r"\$")  # a $ in a name begins no formula


def _width(text: str) -> float:
    """Of a class name, in inches."""
    if not text:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        return float(TextPath((0, 0), text, size=NAME_SIZE).get_extents().width) / 72 + 0.06


def save(path: Path, figure: Figure) -> None:
    """Write a figure, whole or not at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks: they are drawn as boxes
        write_whole(path, figure.savefig)


def draw_samples(
    path: Path,
    images: "np.ndarray[Any, Any]",
    labels: "np.ndarray[Any, Any]",
    names: Sequence[str],
) -> None:
    """Save a grid of up to 100 samples: a class per column if every class fits, else as numbered.

    Args:
        path: the picture's file.
        images: bytes (M, H, W, C).
        labels: one class per image.
        names: by label; empty for an unconditional model.
    """
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    classes = sorted(set(labels.tolist())) if names else []
    title = f"{len(images)} samples"
    if 1 < len(classes) <= MAX_COLUMNS:
        by_class = [np.flatnonzero(labels == k)[:MAX_COLUMNS] for k in classes]
        blank = len(tensors)  # where a class has fewer samples than others
        tensors = torch.cat([tensors, torch.full_like(tensors[:1], 255)])
        order = [
            int(column[row]) if row < len(column) else blank
            for row in range(max(map(len, by_class)))
            for column in by_class
        ]
        draw_grids(path, {"": tensors[order]}, column_names(classes, names), title)
    else:
        columns = min(MAX_COLUMNS, len(images))
        count = min(len(images) // columns, MAX_COLUMNS) * columns
        draw_grids(path, {"": tensors[:count]}, [""] * columns, title)


def visible(image: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """What is shown of an image (…, C): its three colours, or one channel as grey.

    Of other numbers of channels than 1 and 3 that is the first three, or the first alone.
    """
    return image[..., :3] if image.shape[-1] >= 3 else image[..., 0]


def fitting_columns(height: int, width: int) -> int:
    """How many images of a size stand in a row: fewer wide ones, so that a grid keeps about its shape."""
    return max(1, round(MAX_COLUMNS * min(1, height / width) ** 0.5))


def tile(images: UInt8[Tensor, "M C H W"], columns: int) -> "np.ndarray[Any, Any]":
    """One picture (height, width[, 3]) of all images, row by row, with a white line between them."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 255, np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top = (index // columns) * (height + 1) + 1
        left = (index % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image
    return visible(canvas)


def draw_rows(path: Path, images: "np.ndarray[Any, Any]", columns: int) -> None:
    """Write images (M, H, W, C) of bytes as a picture without words, so many in a row.

    Raises:
        UserError: the disk is full or not writable.
    """
    write_whole(path, _enlarged(images, columns).save)


def _enlarged(images: "np.ndarray[Any, Any]", columns: int) -> Image.Image:
    """A grid of images, small ones enlarged pixel by pixel."""
    picture = tile(torch.from_numpy(images).permute(0, 3, 1, 2), columns)
    factor = max(1, SMALLEST_SIDE // images.shape[2])
    return Image.fromarray(picture.repeat(factor, 0).repeat(factor, 1))


def write_pngs(folder: Path, images: "np.ndarray[Any, Any]") -> None:
    """Write images (M, H, W, C) of bytes as 000000.png …, whole or not at all.

    Raises:
        UserError: the disk is full or not writable.
    """

    def write(partial: Path) -> None:
        partial.mkdir()
        for number, image in enumerate(images):
            Image.fromarray(np.ascontiguousarray(visible(image))).save(
                partial / f"{number:06d}.png"
            )

    write_whole(folder, write)


def write_animation(path: Path, frames: Sequence["np.ndarray[Any, Any]"]) -> None:
    """Write a .gif or .webp of grids, the last of which stays for a while.

    Args:
        path: the file; its ending says which.
        frames: the same images, bytes (M, H, W, C), at one time after the other.

    Raises:
        UserError: the disk is full or not writable.
    """
    columns = max(1, round(len(frames[0]) ** 0.5))
    pictures = []
    for frame in frames:
        pictures.append(_enlarged(frame, columns))
    durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
    write_whole(
        path,
        lambda partial: pictures[0].save(
            partial, save_all=True, append_images=pictures[1:], duration=durations, loop=0
        ),
    )


def draw_curves(path: Path, metrics: Sequence[Mapping[str, Any]], title: str) -> None:
    """Save a run's curves: each term of the training loss, held-out loss over steps, and over t.

    Args:
        path: the picture's file.
        metrics: the lines of metrics.jsonl.
        title: stands above all.
    """
    figure = Figure(figsize=(11, 3.2), dpi=144, layout="constrained")
    figure.suptitle(shown(title), fontsize=9)
    losses, heldout, by_timestep = figure.subplots(1, 3)
    training = [line for line in metrics if "loss" in line]
    terms = dict.fromkeys(name for line in training for name in line if name.endswith("_loss"))
    for number, name in enumerate(terms):
        points = [(line["step"], line[name]) for line in training if name in line]
        steps, values = [step for step, _ in points], [value for _, value in points]
        if any(values):
            colour, label = f"C{number}", name.removesuffix("_loss")
            losses.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            losses.plot(steps, _smooth(values), color=colour, label=label)
    losses.set(title="training losses", xlabel="step")
    evaluated = [line for line in metrics if "heldout_ema" in line]
    for name, label in (("heldout_ema", "EMA weights"), ("heldout_raw", "raw weights")):
        heldout.plot(
            [line["step"] for line in evaluated],
            [line[name] for line in evaluated],
            marker="o",
            markersize=3,
            label=label,
        )
        if evaluated:
            values = evaluated[-1][f"{name}_by_timestep"]
            centres = [(k + 0.5) / len(values) for k in range(len(values))]
            by_timestep.plot(centres, values, marker="o", markersize=3, label=label)
    heldout.set(title="held-out denoising loss", xlabel="step")
    by_timestep.set(title="held-out denoising loss at the end", xlabel="t (1 is noise)")
    for axis in (losses, heldout, by_timestep):
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    save(path, figure)


def _smooth(values: Sequence[float], window: float = 0.05) -> list[float]:
    """Moving average over a share of the curve."""
    half = max(1, int(len(values) * window)) // 2 + 1
    return [float(np.mean(values[max(0, i - half) : i + half])) for i in range(len(values))]


def data_uri(picture: "np.ndarray[Any, Any]", side: int = 0) -> str:
    """A picture as the address of itself, for files that load nothing.

    Args:
        picture: bytes (height, width[, 3 or 4]): grey, RGB or RGBA.
        side: enlarged by a whole factor, pixel by pixel, to at least this height.
    """
    factor = max(1, -(-side // len(picture)))
    image = Image.fromarray(picture.repeat(factor, 0).repeat(factor, 1))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

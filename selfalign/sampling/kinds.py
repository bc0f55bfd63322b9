"""Pictures by kind: lines of signals, moving pictures of videos, images above their captions."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from selfalign.data.shapes import to_uint8
from selfalign.disk import write_whole
from selfalign.sampling.pictures import draw_grids, save, shown, tile, visible

MILLISECONDS = 120
"""Each frame of a moving picture is shown for so long."""
CAPTION_COLUMNS = 8
CAPTION_WIDTH = 16
ENLARGED = 96
"""Height in pixels to which the images of a moving picture are enlarged at least."""


def draw_panels(
    path: Path,
    panels: Mapping[str, Float[Tensor, "M C *sides"]],
    columns: Sequence[str],
    title: str,
) -> None:
    """Save samples of any kind, a panel per entry, with a name above every column.

    Videos also get a moving picture beside it, `PATH.gif`, whose frames are grids; the picture itself shows
    each video's frames below each other.

    Args:
        path: the picture's file.
        panels: samples in [-1, 1] by panel title, row by row; M is a multiple of the number of columns.
        columns: names of the columns.
        title: stands above all.
    """
    first = next(iter(panels.values()))
    if first.ndim == 3:
        return draw_lines(path, panels, columns, title)
    if first.ndim == 5:
        draw_moving(path.with_suffix(".gif"), torch.cat(list(panels.values())), len(columns))
    pictures = {name: to_uint8(samples.float()).cpu() for name, samples in panels.items()}
    draw_grids(path, pictures, columns, title)


def draw_lines(
    path: Path, panels: Mapping[str, Float[Tensor, "M C L"]], columns: Sequence[str], title: str
) -> None:
    """Save signals as lines: a plot per column, the signals of a column over each other.

    Args: as for `draw_panels`. Of a signal with several channels each has its colour.
    """
    count = len(columns)
    size = (max(4.0, 1.6 * count), 1.5 * len(panels) + 0.7)
    figure = Figure(figsize=size, dpi=144, layout="constrained")
    figure.suptitle(shown(title), fontsize=9)
    axes = figure.subplots(len(panels), count, squeeze=False, sharex=True, sharey=True)
    for row, (name, signals) in zip(axes, panels.items(), strict=True):
        for column, axis in enumerate(row):
            for signal in signals[column::count]:
                draw_signal(axis, signal)
            axis.set_title(shown(columns[column], 24), fontsize=8)
            axis.tick_params(labelsize=6)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(name, fontsize=8)
    save(path, figure)


def draw_signal(axis: Axes, signal: Float[Tensor, "C L"]) -> None:
    """One signal's channels as lines; of a single value, which makes no line, as dots."""
    for channel, values in enumerate(signal.float().cpu()):
        mark = "." if int(values.isfinite().sum()) == 1 else ""
        colour = f"C{channel % 10}"
        axis.plot(values.numpy(), marker=mark, color=colour, alpha=0.5, linewidth=0.8)


def draw_moving(path: Path, videos: Float[Tensor, "M C T H W"], columns: int) -> None:
    """Save videos as one moving picture, side by side in a grid.

    Args:
        path: the file; a GIF.
        videos: in [-1, 1].
        columns: of the grid.
    """
    factor = max(1, ENLARGED // videos.shape[3])
    videos = videos.nan_to_num(0)  # beyond the end of a shorter one
    frames = [
        tile(to_uint8(videos[:, :, time].float()).cpu(), columns) for time in range(videos.shape[2])
    ]
    images = [Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1)) for frame in frames]

    def write(partial: Path) -> None:
        images[0].save(
            partial,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=MILLISECONDS,
            loop=0,
        )

    write_whole(path, write)


def draw_captioned(
    path: Path, images: Float[Tensor, "M C *sides"], captions: Sequence[str], title: str
) -> None:
    """Save samples in a grid, each above its caption.

    Args:
        path: the picture's file.
        images: in [-1, 1], or samples of another kind: signals as lines, videos as pictures.
        captions: one per image.
        title: stands above all.
    """
    columns = min(CAPTION_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    size = (1.25 * columns, 1.55 * rows + 0.4)
    figure = Figure(figsize=size, dpi=144, layout="constrained")
    figure.suptitle(shown(title), fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    signals = images.ndim == 3
    pictures = None if signals else to_uint8(images.float()).permute(0, 2, 3, 1).cpu().numpy()
    for index, axis in enumerate(axes):
        if index >= len(images):
            axis.axis("off")
            continue
        if pictures is None:
            draw_signal(axis, images[index])
            axis.set(xticks=[], yticks=[], ylim=(-1.1, 1.1))
        else:
            axis.axis("off")
            picture = visible(pictures[index])
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        lines = "\n".join(textwrap.wrap(shown(captions[index]), CAPTION_WIDTH)[:2])
        axis.text(0.5, -0.04, lines, fontsize=6, ha="center", va="top", transform=axis.transAxes)
    save(path, figure)

"""Charts of pages, drawn by matplotlib in the page's fonts and colours."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from selfalign.pages.numbers import Measured
from selfalign.pages.svg import drawing, palette, to_svg

COLOURS = 8
"""Variables s0 to s7 of the style sheet; after them the same again, dashed."""
DASHES = ("", "5 3", "1.5 2.5")
WIDTH = 5.0
"""Inches of 72 units: text of 10.5 units is as legible on a phone as beside another chart on a screen."""
SETTLED = 0.25
"""Share of the steps after which a learning curve counts for the range of its axis."""
_ROW = 0.62
"""Inches of a row of a forest plot."""
_LINE = 0.27
"""Rows that a further line of its label takes."""


@dataclass(frozen=True)
class Chart:
    """A chart and what stands around it."""

    title: str
    svg: str
    caption: str = ""
    legend: Sequence["Series"] = ()
    """Whose colours are explained above it."""


@dataclass(frozen=True)
class Series:
    """A line: what it is of has the same colour and dashes in every chart."""

    name: str
    style: int
    """Its place among all lines of the page."""
    points: Sequence[tuple[float, Measured]] = ()

    @property
    def colour(self) -> str:
        """Name of its variable in the style sheet."""
        return f"s{self.style % COLOURS}"

    @property
    def dashes(self) -> str:
        """Lengths of its dashes and gaps; empty for a whole line."""
        return DASHES[self.style // COLOURS % len(DASHES)]


@dataclass(frozen=True)
class Bar:
    """A difference with its interval, in a forest plot or over t."""

    label: str
    difference: Measured
    kind: str
    """Name of a variable in the style sheet: helps, hurts, equal or unsure."""
    note: str = ""
    """What stands at the end of its row."""
    margin: float = 0.0
    """Below which a difference counts as none; 0 where there is no such margin."""


def _ends(estimate: Measured) -> tuple[float, float]:
    return estimate.interval() or (estimate.mean, estimate.mean)


def _axis(height: float, left: float = 0.145) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    below = 0.5 / height
    axis = figure.add_axes((left, below, 0.975 - left, 1 - below - 0.12 / height))
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)
    axis.set_axisbelow(True)
    return figure, axis


def _limits(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    space = margin * (high - low) or 0.05 * abs(high) or 1.0
    return low - space, high + space


def line_chart(
    series: Sequence[Series], x_label: str, title: str, shares: Sequence[float] = ()
) -> str:
    """Means over steps with their intervals as bands, or as bars over chosen shares.

    The range of the vertical axis is that of the settled part of the curves: what was untrained at the
    start leaves the frame at the top.

    Args:
        series: a line each, with at least one point in all.
        x_label: below the horizontal axis.
        title: for those who cannot see it.
        shares: of the training images, spaced by their ratios; none for steps.
    """
    xs = sorted({x for line in series for x, _ in line.points})
    settled = 0.0 if shares else min(SETTLED * xs[-1], xs[-2:][0] - 1)
    with drawing():
        figure, axis = _axis(3.28)
        axis.grid(axis="y", color=palette("rule"), linewidth=0.75)
        for line in series:
            _draw_line(axis, line, bars=bool(shares))
        heights = [
            v for line in series for x, mean in line.points if x > settled for v in _ends(mean)
        ]
        axis.set_ylim(_limits(heights, 0.06))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        if shares:
            axis.set_xscale("log", base=2)
            axis.set_xticks(shares)
            axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
        else:
            axis.set_xlim(0, xs[-1] * 1.01)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlabel(x_label, color=palette("quiet"))
        axis.tick_params(labelcolor=palette("quiet"))
        return to_svg(figure, f"{title} over {x_label}, a line per variant")


def curve_chart(series: Sequence[Series], x_label: str, title: str) -> str:
    """Lines over a number, with their intervals as bands and a line at zero where that is in sight.

    Args:
        series: a line each, with at least one point in all.
        x_label: below the horizontal axis.
        title: for those who cannot see it.
    """
    with drawing():
        figure, axis = _axis(3.28)
        axis.grid(axis="y", color=palette("rule"), linewidth=0.75)
        for line in series:
            _draw_line(axis, line)
        heights = [end for line in series for _, value in line.points for end in _ends(value)]
        low, high = _limits(heights, 0.06)
        if low <= 0 <= high:
            axis.axhline(0, color=palette("quiet"), linewidth=1.1)
        axis.set_ylim(low, high)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlabel(x_label, color=palette("quiet"))
        axis.tick_params(labelcolor=palette("quiet"))
        return to_svg(figure, title)


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
    title: str,
    signed: bool = False,
) -> str:
    """A table of numbers as coloured cells, each with its number where there is room.

    Args:
        values: row by row, the first on top; None leaves a cell empty.
        rows, columns: their names.
        row_title, column_title: what the names are.
        title: for those who cannot see it.
        signed: colours tell the sign, and how far a number is from zero; else how large it is.
    """
    known = [value for row in values for value in row if value is not None]
    low, high = (0.0, max(map(abs, known), default=0)) if signed else (min(known), max(known))
    places = _places(max(map(abs, known), default=0))
    left, width = 0.62, WIDTH - 0.62
    side = min(width / len(columns), max(0.5, 0.1 + 0.085 * max(map(len, columns))))
    height = min(side, 0.4) * len(rows) + 0.75
    with drawing():
        figure = Figure(figsize=(WIDTH, height))
        extent = (left / WIDTH, 0.1 / height, side * len(columns) / WIDTH, (height - 0.75) / height)
        axis = figure.add_axes(extent)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value is None:
                    continue
                strength = (abs(value) if signed else value - low) / ((high - low) or 1.0)
                colour = palette("hurts" if signed and value > 0 else "helps")
                cell = Rectangle((j, i), 1, 1, facecolor=colour, alpha=0.04 + 0.56 * strength)
                cell.set_linewidth(0)
                axis.add_patch(cell)
                rounded = round(value, places) + 0.0  # no −0
                text = f"{rounded:.{places}f}".replace("-", "−")
                text = text.replace("0.", ".", 1) if abs(rounded) < 1 else text
                if len(text) * 0.085 <= side:
                    axis.text(j + 0.5, i + 0.5, text, ha="center", va="center")
        axis.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_xticks([k + 0.5 for k in range(len(columns))], _thinned(columns, side))
        axis.set_yticks([k + 0.5 for k in range(len(rows))], rows)
        axis.xaxis.tick_top()
        axis.tick_params(length=0, labelcolor=palette("quiet"), pad=2)
        corner: dict[str, Any] = {
            "transform": figure.transFigure,
            "color": palette("quiet"),
            "va": "top",
        }
        figure.text(0.0, 1 - 0.02 / height, f"{row_title} ↓  {column_title} →", **corner)
        return to_svg(figure, title)


def _places(largest: float) -> int:
    """Decimals that leave two or three digits."""
    return 0 if largest >= 100 else 1 if largest >= 10 else 2 if largest >= 0.1 else 3


def _thinned(names: Sequence[str], side: float) -> list[str]:
    """Every name, or every second or third where they would touch."""
    step = max(1, -(-max(map(len, names)) * 85 // int(1000 * side)))
    return [name if k % step == 0 else "" for k, name in enumerate(names)]


def picture_grid(
    pictures: Sequence[Sequence[Any]],
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
    title: str,
) -> str:
    """Pictures in rows and columns with names, enlarged by the viewer, pixel by pixel.

    Args:
        pictures: bytes (height, width[, 3 or 4]) of each cell, row by row.
        rows, columns, row_title, column_title, title: as for `heat_map`.
    """
    left = 0.62
    side = min((WIDTH - left) / len(columns), 1.1)
    height = side * len(rows) + 0.6
    with drawing():
        figure = Figure(figsize=(WIDTH, height))
        gap = 0.04
        for i, row in enumerate(pictures):
            for j, picture in enumerate(row):
                place = (
                    (left + j * side) / WIDTH,
                    (side * (len(rows) - 1 - i) + 0.05) / height,
                    (side - gap) / WIDTH,
                    (side - gap) / height,
                )
                axis = figure.add_axes(place)
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="none")
                axis.set_axis_off()
        style: dict[str, Any] = {"transform": figure.transFigure, "color": palette("quiet")}
        for i, name in enumerate(rows):
            y = (side * (len(rows) - i - 0.5) + 0.05) / height
            figure.text(0.0, y, name, va="center", **style)
        for j, name in enumerate(_thinned(columns, side)):
            x = (left + (j + 0.5) * side - gap / 2) / WIDTH
            figure.text(x, 1 - 0.3 / height, name, ha="center", va="center", **style)
        figure.text(0.0, 1, f"{row_title} ↓  {column_title} →", va="top", **style)
        return to_svg(figure, title)


def forest_plot(bars: Sequence[Bar], better: str, title: str) -> str:
    """Differences with their intervals against zero, a row each, margins shaded.

    Args:
        bars: a row each.
        better: lower or higher.
        title: for those who cannot see it.
    """
    labels = [textwrap.wrap(bar.label, _label_room(bar.note)) or [""] for bar in bars]
    further = [_LINE * (len(lines) - 1) for lines in labels]
    end = len(bars) + sum(further)
    with drawing():
        figure, axis = _axis(end * _ROW + 0.8, left=0.02)
        axis.axvline(0, color=palette("quiet"), linewidth=1.1)
        axis.grid(axis="x", color=palette("rule"), linewidth=0.75)
        across = axis.get_yaxis_transform()
        values, row = [0.0], -1.0
        for bar, lines, more in zip(bars, labels, further, strict=True):
            row += 1 + more
            low, high = _ends(bar.difference)
            values += [low, high]
            if bar.margin:
                values += [bar.margin, -bar.margin]
                axis.fill_betweenx(
                    [row - 0.02, row + 0.44],
                    -bar.margin,
                    bar.margin,
                    color=palette("band"),
                    linewidth=0,
                )
            _draw_bar(axis, bar, [low, high], [row + 0.21] * 2, bar.difference.mean, row + 0.21)
            style: dict[str, Any] = {"transform": across, "va": "center"}
            axis.text(0, row - 0.2 - more / 2, "\n".join(lines), weight="bold", **style)
            axis.text(1, row - 0.2 - more, bar.note, ha="right", color=palette(bar.kind), **style)
        axis.set(xlim=_limits(values, 0.08), ylim=(end - 0.4, -0.5), yticks=[])
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.ticklabel_format(axis="x", style="plain")  # a power of ten would lie over "worse"
        axis.tick_params(labelcolor=palette("quiet"))
        sides = ("better", "worse") if better == "lower" else ("worse", "better")
        for x, side, align in ((0, f"← {sides[0]}", "left"), (1, f"{sides[1]} →", "right")):
            axis.text(
                x,
                0.06 / figure.get_figheight(),
                side,
                transform=figure.transFigure,
                ha=align,
                color=palette("quiet"),
            )
        return to_svg(figure, title)


def timestep_chart(bars: Sequence[Bar], title: str) -> str:
    """Differences with their intervals in equal bins of t."""
    with drawing():
        figure, axis = _axis(3.28)
        axis.axhline(0, color=palette("quiet"), linewidth=1.1)
        axis.grid(axis="y", color=palette("rule"), linewidth=0.75)
        for index, bar in enumerate(bars):
            x = (index + 0.5) / len(bars)
            _draw_bar(axis, bar, [x, x], list(_ends(bar.difference)), x, bar.difference.mean)
        axis.set_xlim(0, 1)
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlabel("t (1 is noise)", color=palette("quiet"))
        axis.tick_params(labelcolor=palette("quiet"))
        return to_svg(figure, title)


def _draw_line(axis: Axes, line: Series, bars: bool = False) -> None:
    """Points joined by a line, their intervals as a band or as bars."""
    dashes = tuple(map(float, line.dashes.split()))
    style: dict[str, Any] = {"color": palette(line.colour), "linewidth": 1.8}
    style["linestyle"] = (0, dashes) if dashes else "solid"
    x, y = [x for x, _ in line.points], [value.mean for _, value in line.points]
    axis.plot(x, y, marker="o", markersize=4, **style)
    low, high = zip(*(_ends(value) for _, value in line.points), strict=True)
    if bars:
        axis.vlines(x, low, high, **style)
    elif len(x) > 1:
        axis.fill_between(x, low, high, color=style["color"], alpha=0.11, linewidth=0)


def _draw_bar(
    axis: Axes, bar: Bar, x: Sequence[float], y: Sequence[float], at: float, height: float
) -> None:
    """An interval and its mean; hollow where nothing can be said."""
    colour = palette(bar.kind)
    inside = palette("paper") if bar.kind == "unsure" else colour
    axis.plot(x, y, color=colour, linewidth=1.8, solid_capstyle="butt")
    axis.plot([at], [height], marker="o", markersize=7, color=colour, markerfacecolor=inside)


def _label_room(note: str) -> int:
    """Bold letters of a label that fit beside a note in a forest plot."""
    return max(12, int(53 - 0.86 * len(note)))

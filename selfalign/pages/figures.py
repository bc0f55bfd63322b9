"""Charts of pages, drawn by matplotlib in the page's fonts and colours."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
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


@dataclass(frozen=True)
class Chart:
    """A chart and what stands around it."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Series:
    """A variant's line: the same colour and dashes in every chart."""

    name: str
    style: int
    """Its place among the variants."""
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
            ends = [_ends(mean) for _, mean in line.points]
            dashes = tuple(map(float, line.dashes.split()))
            style: dict[str, Any] = {"color": palette(line.colour), "linewidth": 1.8}
            style["linestyle"] = (0, dashes) if dashes else "solid"
            x, y = [x for x, _ in line.points], [mean.mean for _, mean in line.points]
            axis.plot(x, y, marker="o", markersize=4, **style)
            if shares:
                axis.vlines(x, *zip(*ends, strict=True), **style)
            elif len(x) > 1:
                low, high = zip(*ends, strict=True)
                axis.fill_between(x, low, high, color=style["color"], alpha=0.11, linewidth=0)
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


def forest_plot(bars: Sequence[Bar], better: str, title: str) -> str:
    """Differences with their intervals against zero, a row each, margins shaded.

    Args:
        bars: a row each.
        better: lower or higher.
        title: for those who cannot see it.
    """
    with drawing():
        figure, axis = _axis(len(bars) * _ROW + 0.8, left=0.02)
        axis.axvline(0, color=palette("quiet"), linewidth=1.1)
        axis.grid(axis="x", color=palette("rule"), linewidth=0.75)
        values = [0.0]
        for row, bar in enumerate(bars):
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
            across = axis.get_yaxis_transform()
            axis.text(
                0, row - 0.2, _short(bar.label, 36), transform=across, weight="bold", va="center"
            )
            axis.text(
                1,
                row - 0.2,
                bar.note,
                transform=across,
                ha="right",
                va="center",
                color=palette(bar.kind),
            )
        axis.set(xlim=_limits(values, 0.08), ylim=(len(bars) - 0.4, -0.5), yticks=[])
        axis.xaxis.set_major_locator(MaxNLocator(5))
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


def _draw_bar(
    axis: Axes, bar: Bar, x: Sequence[float], y: Sequence[float], at: float, height: float
) -> None:
    """An interval and its mean; hollow where nothing can be said."""
    colour = palette(bar.kind)
    inside = palette("paper") if bar.kind == "unsure" else colour
    axis.plot(x, y, color=colour, linewidth=1.8, solid_capstyle="butt")
    axis.plot([at], [height], marker="o", markersize=7, color=colour, markerfacecolor=inside)


def _short(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder="…") if " " in text else text[:width]

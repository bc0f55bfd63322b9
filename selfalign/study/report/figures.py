"""The report's charts, as SVG in the page's fonts and colours.

All are 360 units wide, so that their text is as legible on a phone as beside each other on a screen.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from matplotlib.ticker import MaxNLocator

from selfalign.study.sentences import mean_with_interval, signed
from selfalign.study.statistics import Outcome, SeedMean

WIDTH, HEIGHT = 360, 236
COLOURS = 8
"""Classes s0 to s7 of the style sheet; after them the same again, dashed."""
_DASHES = ("", "5 3", "1.5 2.5")
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 34
_SETTLED = 0.25
"""Share of the steps after which a learning curve counts for the range of its axis."""


@dataclass(frozen=True)
class Series:
    """A variant's line: the same colour and dashes in every chart."""

    name: str
    style: int
    """Its place among the variants."""
    points: Sequence[tuple[float, SeedMean]] = ()

    @property
    def attributes(self) -> str:
        """Class and dashes of its stroke."""
        dash = _DASHES[self.style // COLOURS % len(_DASHES)]
        return f'class="s{self.style % COLOURS}"' + (f' stroke-dasharray="{dash}"' * bool(dash))


@dataclass(frozen=True)
class Point:
    """A difference in a forest plot or over t."""

    label: str
    difference: SeedMean
    outcome: Outcome


@dataclass(frozen=True)
class _Axis:
    """From numbers to places between two ends."""

    low: float
    high: float
    start: float
    end: float
    transform: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        low, high, x = map(self.transform, (self.low, self.high, value))
        return self.start + (self.end - self.start) * (x - low) / (high - low)

    def ticks(self, amount: int = 5) -> list[float]:
        """Round numbers within the axis."""
        values = MaxNLocator(amount, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        return [float(v) for v in values if self.low - slack <= v <= self.high + slack]


def _tick_label(value: float) -> str:
    if abs(value) >= 1e4:
        return f"{value / 1000:g}K" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{round(value, 10):g}".replace("-", "−")


def _ends(mean: SeedMean) -> tuple[float, float]:
    return mean.interval or (mean.mean, mean.mean)


def _range(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    space = margin * (high - low) or 0.05 * abs(high) or 1.0
    return low - space, high + space


def _svg(height: float, title: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}" '
        f'class="chart">{body}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _horizontal_grid(y: _Axis) -> str:
    return "".join(
        _line(_LEFT, y(v), WIDTH - _RIGHT, y(v), "zero" if v == 0 else "grid")
        + _text(_LEFT - 6, y(v) + 3.5, _tick_label(v), "end", "tick")
        for v in y.ticks()
    )


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, ticks: Sequence[float] | None = None
) -> str:
    """Means over steps with their intervals as bands, or as bars where x has given ticks.

    The range of the vertical axis is that of the settled part of the curves: what was untrained at the
    start leaves the frame at the top.

    Args:
        series: a line each, with at least one point in all.
        x_label: below the horizontal axis.
        y_label: for those who cannot see it.
        ticks: positions that were chosen, spaced by their ratios; None for steps.
    """
    xs = [x for line in series for x, _ in line.points]
    settled = 0.0 if ticks else min(_SETTLED * max(xs), sorted(set(xs))[-2:][0] - 1)
    heights = [v for line in series for x, mean in line.points if x > settled for v in _ends(mean)]
    y = _Axis(*_range(heights), HEIGHT - _BOTTOM, _TOP)
    left, right = (min(ticks), max(ticks)) if ticks else (0.0, max(xs))
    if ticks:
        x = _Axis(left, right, _LEFT + 12, WIDTH - _RIGHT - 12, math.log2)
    else:
        x = _Axis(left, right, _LEFT, WIDTH - _RIGHT)
    body = [_horizontal_grid(y)]
    for value in ticks or x.ticks():
        label = f"{100 * value:g} %" if ticks else _tick_label(value)
        body.append(_text(x(value), HEIGHT - _BOTTOM + 15, label, "middle", "tick"))
    body.append(_text((_LEFT + WIDTH) / 2, HEIGHT - 4, x_label, "middle", "label"))
    # A nested svg clips what lies outside of the frame.
    frame = f'x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" height="{HEIGHT - _TOP - _BOTTOM}"'
    box = f"{_LEFT} {_TOP} {WIDTH - _LEFT - _RIGHT} {HEIGHT - _TOP - _BOTTOM}"
    body.append(f'<svg {frame} viewBox="{box}">')
    for line in series:
        body.append(_drawn_line(line, x, y, bars=ticks is not None))
    return _svg(HEIGHT, f"{y_label} over {x_label}, a line per variant", "".join(body) + "</svg>")


def _drawn_line(line: Series, x: _Axis, y: _Axis, bars: bool) -> str:
    places = [(x(at), mean) for at, mean in line.points]
    path = " ".join(f"{px:.1f},{y(mean.mean):.1f}" for px, mean in places)
    parts = [f'<g {line.attributes} data-variant="{escape(line.name)}">']
    if bars:
        for px, mean in places:
            low, high = _ends(mean)
            parts.append(_line(px, y(low), px, y(high), "bar"))
    elif len(places) > 1:
        upper = [f"{px:.1f},{y(_ends(mean)[1]):.1f}" for px, mean in places]
        lower = [f"{px:.1f},{y(_ends(mean)[0]):.1f}" for px, mean in reversed(places)]
        parts.append(f'<polygon points="{" ".join(upper + lower)}" class="band"/>')
    parts.append(f'<polyline points="{path}" class="line"/>')
    for (at, mean), (px, _) in zip(line.points, places, strict=True):
        told = f"{line.name}, {at:g}: {mean_with_interval(mean)}"
        parts.append(
            f'<circle cx="{px:.1f}" cy="{y(mean.mean):.1f}" r="2.2" class="dot">'
            f"<title>{escape(told)}</title></circle>"
        )
    return "".join(parts) + "</g>"


_ROW = 46


def forest_plot(points: Sequence[Point], better: Literal["lower", "higher"], title: str) -> str:
    """Differences with their intervals against zero, a row each, and which side is the better one."""
    ends = [v for point in points for v in (*_ends(point.difference), 0.0)]
    bottom = len(points) * _ROW + 8
    x = _Axis(*_range(ends, 0.08), 8, WIDTH - 8)
    body = []
    for value in x.ticks(5):
        body.append(_line(x(value), 4, x(value), bottom, "zero" if value == 0 else "grid"))
        body.append(_text(x(value), bottom + 14, _tick_label(value), "middle", "tick"))
    for row, point in enumerate(points):
        top = 4 + row * _ROW
        low, high = _ends(point.difference)
        mean = point.difference.mean
        y = top + 30
        kind = point.outcome.replace(" ", "-")
        body.append(_text(8, top + 13, point.label, kind="halo strong"))
        body.append(
            _text(
                WIDTH - 8,
                top + 13,
                f"{signed(mean, 2)}, {point.outcome}",
                "end",
                f"halo {kind}-text",
            )
        )
        body.append(f'<g class="{kind}">{_line(x(low), y, x(high), y, "bar")}')
        if point.difference.interval:
            body.append(_line(x(low), y - 4, x(low), y + 4, "bar"))
            body.append(_line(x(high), y - 4, x(high), y + 4, "bar"))
        told = f"{point.label}: {mean_with_interval(point.difference)}"
        body.append(
            f'<circle cx="{x(mean):.1f}" cy="{y}" r="5" class="dot"><title>{escape(told)}</title>'
            "</circle></g>"
        )
    left, right = ("better", "worse") if better == "lower" else ("worse", "better")
    body.append(_text(8, bottom + 30, f"← {left}", kind="label"))
    body.append(_text(WIDTH - 8, bottom + 30, f"{right} →", "end", "label"))
    return _svg(bottom + 36, title, "".join(body))


def timestep_chart(points: Sequence[Point], title: str) -> str:
    """Differences with their intervals in equal bins of t."""
    ends = [v for point in points for v in (*_ends(point.difference), 0.0)]
    y = _Axis(*_range(ends), HEIGHT - _BOTTOM, _TOP)
    x = _Axis(0, 1, _LEFT, WIDTH - _RIGHT)
    body = [_horizontal_grid(y)]
    for value in x.ticks(5):
        body.append(_text(x(value), HEIGHT - _BOTTOM + 15, _tick_label(value), "middle", "tick"))
    body.append(_text((_LEFT + WIDTH) / 2, HEIGHT - 4, "t (1 is noise)", "middle", "label"))
    for index, point in enumerate(points):
        px = x((index + 0.5) / len(points))
        low, high = _ends(point.difference)
        told = f"t {point.label}: {mean_with_interval(point.difference)}, {point.outcome}"
        body.append(
            f'<g class="{point.outcome.replace(" ", "-")}">{_line(px, y(low), px, y(high), "bar")}'
            f'<circle cx="{px:.1f}" cy="{y(point.difference.mean):.1f}" r="3.5" class="dot">'
            f"<title>{escape(told)}</title></circle></g>"
        )
    return _svg(HEIGHT, title, "".join(body))

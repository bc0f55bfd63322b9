"""The report's tables: cells with the text they show and the number they are sorted by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from selfalign.study.grid import Grid, Table
from selfalign.study.results import METRICS
from selfalign.study.sentences import mean_with_interval, number, percent, signed
from selfalign.study.statistics import Analysis, EffectEstimate, QualityCost, SeedMean, Trend

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One field of a table."""

    text: str
    value: float | None = None
    """What a number is sorted by; None where the text is."""
    kind: str = ""
    """Class of the style sheet."""


@dataclass(frozen=True)
class Column:
    """A heading."""

    title: str
    numeric: bool = False
    foreign: bool = False
    """Whether it holds the paper's figures: of another model, other data and another metric."""


@dataclass(frozen=True)
class TableView:
    """A table as the page shows it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def _mean_cell(mean: SeedMean | None) -> Cell:
    return Cell(MISSING) if mean is None else Cell(mean_with_interval(mean), mean.mean)


def _metric_column(name: str) -> Column:
    arrow = "↓" if METRICS[name].better == "lower" else "↑"
    return Column(f"{METRICS[name].title} {arrow}", numeric=True)


def variant_table(table: Table, analysis: Analysis) -> TableView:
    """A table of the grid: its variants, our means with intervals, and the paper's own figures.

    Those stand beside the headline metrics; the other metrics follow.
    """
    factors = _ordered(name for row in table.rows for name in row.factors)
    papers = _ordered(name for row in table.rows for name in row.paper)
    others = [name for name in analysis.metrics if name not in analysis.headline]
    rows = []
    for row in table.rows:
        means = analysis.means[row.variant]
        cells = [Cell(row.variant, kind="name")]
        cells += [Cell(row.factors.get(name, MISSING)) for name in factors]
        cells += [_mean_cell(means.get(name)) for name in analysis.headline]
        cells += [
            Cell(number(row.paper[name], 4), row.paper[name], "foreign")
            if name in row.paper
            else Cell(MISSING, kind="foreign")
            for name in papers
        ]
        cells += [_mean_cell(means.get(name)) for name in others]
        rows.append(tuple(cells))
    columns = (
        Column("variant"),
        *map(Column, factors),
        *map(_metric_column, analysis.headline),
        *(Column(f"paper: {name}", numeric=True, foreign=True) for name in papers),
        *map(_metric_column, others),
    )
    return TableView(table.title, columns, tuple(rows))


def all_variants(grid: Grid, analysis: Analysis) -> TableView:
    """Every variant of a grid that has no tables of its own."""
    rows = [
        (Cell(name, kind="name"), *(_mean_cell(means.get(metric)) for metric in analysis.metrics))
        for name, means in analysis.means.items()
    ]
    columns = (Column("variant"), *map(_metric_column, analysis.metrics))
    return TableView(f"All variants of {grid.name}", columns, tuple(rows))


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def effect_table(title: str, estimates: Sequence[EffectEstimate]) -> TableView:
    """One effect on every metric."""
    rows = []
    for estimate in estimates:
        metric, found = METRICS[estimate.metric], estimate.estimate
        arrow = "↓" if metric.better == "lower" else "↑"
        name = Cell(f"{metric.title} {arrow}", kind="name")
        if found is None:
            rows.append((name, *[Cell(MISSING)] * 4, Cell("not known yet"), Cell(MISSING)))
            continue
        difference = found.difference
        interval = difference.interval
        relative = percent(difference.mean, found.without)
        sign = "−" if difference.mean < 0 else "+"
        seeds = len(difference.values)
        rows.append(
            (
                name,
                Cell(signed(difference.mean), difference.mean),
                Cell(f"{signed(interval[0])} to {signed(interval[1])}", interval[0])
                if interval
                else Cell("one seed, none"),
                Cell(sign + relative if relative else MISSING, difference.mean / found.without)
                if found.without
                else Cell(MISSING),
                Cell(f"{difference.agreeing} of {seeds}", difference.agreeing / seeds),
                Cell(estimate.outcome, kind=estimate.outcome.replace(" ", "-") + "-text"),
                Cell(estimate.verdict or MISSING),
            )
        )
    columns = (
        Column("metric"),
        Column("difference", numeric=True),
        Column("95 % interval", numeric=True),
        Column("relative", numeric=True),
        Column("seeds of that sign", numeric=True),
        Column("outcome"),
        Column("the paper’s claim"),
    )
    return TableView(f"{title}: with minus without, on every metric", columns, tuple(rows))


def trend_table(trends: Sequence[Trend], metric: str, fractions: Sequence[float]) -> TableView:
    """The effects on one metric at every train fraction, with minus without."""
    rows = []
    for trend in trends:
        found = trend.by_fraction
        cells = [_difference_cell(found[f].difference if f in found else None) for f in fractions]
        name = Cell(trend.effect.title, kind="name")
        rows.append((name, *cells, _difference_cell(trend.change)))
    columns = (
        Column("effect"),
        *(Column(f"{100 * fraction:g} % of the images", numeric=True) for fraction in fractions),
        Column("smallest minus largest", numeric=True),
    )
    title = f"Effects on the {METRICS[metric].title} by share of the training images"
    return TableView(title, columns, tuple(rows))


def _difference_cell(difference: SeedMean | None) -> Cell:
    cell = _mean_cell(difference)
    return Cell("+" + cell.text, cell.value) if (cell.value or 0) > 0 else cell


def _with_range(values: Sequence[float], unit: float = 1.0, digits: int = 3) -> Cell:
    if not values:
        return Cell("not reached")
    mean = sum(values) / len(values)
    text = number(mean / unit, digits)
    if len(values) > 1:
        text += f" ({number(min(values) / unit, digits)} to {number(max(values) / unit, digits)})"
    return Cell(text, mean)


def cost_table(costs: Sequence[QualityCost], metric: str, baseline: str) -> TableView:
    """What each variant needs to reach the baseline's last value of one metric."""
    rows = []
    for cost in costs:
        steps = [step for step in cost.steps.values() if step is not None]
        rows.append(
            (
                Cell(cost.variant, kind="name"),
                Cell(f"{cost.reached} of {len(cost.steps)}", cost.reached / len(cost.steps)),
                _with_range(steps),
                _with_range(list(cost.flops.values()), 1e12),
                _with_range(list(cost.seconds.values())),
                _with_range(list(cost.relative_flops.values()), digits=2),
            )
        )
    columns = (
        Column("variant"),
        Column("seeds that reach it", numeric=True),
        Column("steps", numeric=True),
        Column("10¹² FLOPs", numeric=True),
        Column("seconds of training", numeric=True),
        Column(f"× FLOPs of {baseline}’s run", numeric=True),
    )
    title = f"To the {METRICS[metric].title} at which {baseline} ends"
    return TableView(title, columns, tuple(rows))

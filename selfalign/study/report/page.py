"""From a study's folder to report.html and report.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

import selfalign
from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.study import sentences
from selfalign.study.grid import Effect
from selfalign.study.paper import PAPER, QUESTION
from selfalign.study.plan import Job, Study
from selfalign.study.profiles import PROFILES
from selfalign.study.report import pictures, provenance
from selfalign.study.report.figures import Point, Series, forest_plot, line_chart, timestep_chart
from selfalign.study.report.tables import (
    TableView,
    all_variants,
    cost_table,
    effect_table,
    trend_table,
    variant_table,
)
from selfalign.study.results import METRICS, StudyResults, read_results
from selfalign.study.statistics import HELDOUT_LOSS, Analysis, SeedMean, analyse
from selfalign.study.statistics import outcome as outcome_of

REPORT_FILE = "report.html"
NUMBERS_FILE = "report.json"


@dataclass(frozen=True)
class Figure:
    """A chart and what stands below it."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class EffectPanel:
    """All that is shown of one effect."""

    effect: Effect
    title: str
    answer: str
    paragraphs: Sequence[str]
    """Of the headline metrics."""
    others: Sequence[str]
    table: TableView
    by_timestep: Figure | None


@dataclass(frozen=True)
class CurvesPanel:
    """The learning curves of variants that are to be read together."""

    title: str
    series: Sequence[Series]
    figures: Sequence[Figure]


@dataclass(frozen=True)
class EfficiencyPanel:
    """Sample efficiency on one metric."""

    figure: Figure
    table: TableView | None
    """Of the effects by train fraction, if the grid has effects."""
    sentences: Sequence[str]


def write_report(folder: Path) -> Path:
    """Write report.html and report.json of a study, finished or not.

    Args:
        folder: the study's.

    Returns:
        The path of report.html.

    Raises:
        UserError: there is no study, or the files cannot be written.
    """
    results = read_results(folder)
    analysis = analyse(results)
    page = _render(folder, results, analysis)
    numbers = json.dumps(_numbers(results, analysis), indent=1) + "\n"
    write_whole(folder / NUMBERS_FILE, lambda path: path.write_text(numbers))
    write_whole(folder / REPORT_FILE, lambda path: path.write_text(page))
    return folder / REPORT_FILE


def _numbers(results: StudyResults, analysis: Analysis) -> dict[str, Any]:
    """What report.json holds: everything that the page says in numbers, and what was run."""
    study = results.study
    return {
        "selfalign_version": selfalign.__version__,
        "study": asdict(study),
        "runs": {
            "done": [run.folder for run in results.done],
            "failed": [asdict(failure) for failure in results.failed],
            "waiting": list(results.waiting),
        },
        "versions": provenance.versions(results.done),
        "train_fraction": study.full_fraction,
        "answers": {panel.effect.title: panel.answer for panel in _effects(analysis, study)},
        **analysis.as_json(),
    }


def _render(folder: Path, results: StudyResults, analysis: Analysis) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("selfalign.study.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    study, grid = results.study, results.study.grid
    jobs = provenance.representatives(study)
    styles = _styles(study)
    names = pictures.class_names(jobs)
    return environment.get_template("report.html.j2").render(
        results=results,
        study=study,
        grid=grid,
        analysis=analysis,
        metrics=METRICS,
        profile=PROFILES.get(study.profile),
        total=len(study.jobs()),
        title=_title(study),
        summary=sentences.summary_sentence(analysis),
        facts=_facts(results),
        forests=_forests(analysis),
        effects=_effects(analysis, study),
        cautions=sentences.caution_sentences(analysis, _most_seeds(analysis)),
        tables=[(table.note, variant_table(table, analysis)) for table in grid.tables]
        or [("", all_variants(grid, analysis))],
        beside_paper=any(row.paper for table in grid.tables for row in table.rows),
        curves=_curves(analysis, study, styles),
        costs=_costs(analysis, grid.baseline),
        efficiency=_efficiency(analysis, study, styles),
        strips=pictures.sample_strips(
            folder,
            [run for run in results.done if run.train_fraction == study.full_fraction],
            study.seeds[0],
            names,
        ),
        **_diagrams(jobs),
        settings=provenance.settings(jobs, results.done),
        versions=provenance.versions(results.done),
        study_command=provenance.study_command(study),
        train_commands={job.variant: provenance.train_command(study, job) for job in jobs},
        selfalign_version=selfalign.__version__,
    )


def _title(study: Study) -> str:
    """The question that the study answers."""
    name = study.grid.name
    return QUESTION if name == PAPER.name else f"What sets the variants of {name} apart?"


def _most_seeds(analysis: Analysis) -> int:
    """Seeds behind the best-founded number."""
    means = [mean for of_variant in analysis.means.values() for mean in of_variant.values()]
    return max((len(mean.values) for mean in means), default=0)


def _styles(study: Study) -> dict[str, int]:
    """A style per variant, for all charts; the baseline's is the first."""
    others = [name for name in study.grid.variants if name != study.grid.baseline]
    return {name: style for style, name in enumerate([study.grid.baseline, *others])}


def _facts(results: StudyResults) -> list[tuple[str, str]]:
    """The status line, fact by fact."""
    study = results.study
    configs = [job.config for job in study.jobs()]

    def listed(values: Sequence[Any]) -> str:
        return ", ".join(map(str, dict.fromkeys(values)))

    seconds = sum(run.seconds for run in results.done)
    fractions = ", ".join(f"{100 * fraction:g} %" for fraction in study.train_fractions)
    return [
        (
            "runs",
            f"{len(results.done)} done, {len(results.failed)} failed, {len(results.waiting)} waiting",
        ),
        ("data set", listed([config.data.name for config in configs])),
        *([("of the training images", fractions)] if study.train_fractions != (1.0,) else []),
        ("model", "SiT " + listed([config.model.size for config in configs])),
        ("steps", listed([f"{config.training.steps:,}" for config in configs])),
        ("seeds", str(len(study.seeds))),
        *([("profile", study.profile)] if study.profile else []),
        *([("training time, all runs", f"{seconds / 3600:.2g} h")] if seconds else []),
    ]


def _forests(analysis: Analysis) -> list[Figure]:
    forests = []
    for metric in analysis.headline:
        points = [
            Point(e.effect.title, e.estimate.difference, e.outcome)
            for e in analysis.effects
            if e.metric == metric and e.estimate
        ]
        if points:
            title = METRICS[metric].title
            told = "; ".join(
                f"{p.label} {sentences.mean_with_interval(p.difference)}" for p in points
            )
            svg = forest_plot(
                points, METRICS[metric].better, f"Effects on the {title}, with intervals: {told}"
            )
            forests.append(Figure(f"Effects on the {title}", svg, METRICS[metric].explanation))
    return forests


def _effects(analysis: Analysis, study: Study) -> list[EffectPanel]:
    panels = []
    for effect in study.grid.effects:
        estimates = [e for e in analysis.effects if e.effect == effect]
        headline = [e for e in estimates if e.metric in analysis.headline]
        others = [e for e in estimates if e.metric not in analysis.headline]
        panels.append(
            EffectPanel(
                effect,
                effect.title,
                sentences.answer_sentence(headline) if headline else "Nothing is measured yet.",
                [sentences.effect_paragraph(e) for e in headline],
                [f"{METRICS[e.metric].title}: {sentences.effect_paragraph(e)}" for e in others],
                effect_table(effect.title, estimates),
                _by_timestep(effect, analysis),
            )
        )
    return panels


def _by_timestep(effect: Effect, analysis: Analysis) -> Figure | None:
    bins: Sequence[SeedMean] = analysis.by_timestep.get(effect.title, ())
    if not bins:
        return None
    points = [
        Point(
            f"{k / len(bins):g} to {(k + 1) / len(bins):g}",
            difference,
            outcome_of(HELDOUT_LOSS, difference),
        )
        for k, difference in enumerate(bins)
    ]
    title = f"{effect.title}: difference of the held-out loss over t"
    caption = "With minus without, in ten bins of the timestep; below zero is better."
    return Figure(title, timestep_chart(points, title), caption)


def _curves(analysis: Analysis, study: Study, styles: Mapping[str, int]) -> list[CurvesPanel]:
    grid = study.grid
    groups = {table.title: [row.variant for row in table.rows] for table in grid.tables} or {
        "All variants": list(grid.variants)
    }
    panels = []
    for title, members in groups.items():
        variants = [name for name in grid.variants if name in members or name == grid.baseline]
        figures = []
        shown: dict[str, Series] = {}
        for metric, curves in analysis.curves.items():
            series = [
                Series(name, styles[name], curves[name]) for name in variants if name in curves
            ]
            if series:
                shown |= {line.name: line for line in series}
                label = METRICS[metric].title
                figures.append(Figure(label, line_chart(series, "step", label)))
        if figures:
            panels.append(CurvesPanel(title, list(shown.values()), figures))
    return panels


def _costs(analysis: Analysis, baseline: str) -> list[tuple[TableView, list[str]]]:
    found = []
    for metric in analysis.curves:
        costs = [cost for cost in analysis.costs if cost.metric == metric]
        if costs:
            told = [sentences.cost_sentence(c, baseline) for c in costs if c.variant != baseline]
            found.append((cost_table(costs, metric, baseline), told))
    return found


def _efficiency(
    analysis: Analysis, study: Study, styles: Mapping[str, int]
) -> list[tuple[EfficiencyPanel, list[Series]]]:
    panels = []
    fractions = sorted(study.train_fractions)
    for metric, variants in analysis.efficiency.items():
        series = [
            Series(name, styles[name], list(points.items()))
            for name, points in variants.items()
            if points
        ]
        if not series:
            continue
        title = METRICS[metric].title
        svg = line_chart(series, "share of the training images", title, fractions)
        trends = [trend for trend in analysis.trends if trend.metric == metric]
        told = [f"{t.effect.title}, {sentences.trend_sentence(t)}" for t in trends]
        table = trend_table(trends, metric, fractions) if trends else None
        panels.append((EfficiencyPanel(Figure(title, svg), table, told), series))
    return panels


def _diagrams(jobs: Sequence[Job]) -> dict[str, Any]:
    """The diagrams, or why there are none."""
    try:
        return {"diagrams": pictures.view_diagrams(jobs), "no_diagrams": ""}
    except UserError as error:
        return {"diagrams": [], "no_diagrams": str(error)}

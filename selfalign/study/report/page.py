"""From a study's folder to report.html and report.json."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

import selfalign
from selfalign.disk import require_no_folder, write_whole
from selfalign.errors import UserError
from selfalign.pages import numbers
from selfalign.pages.figures import (
    Bar,
    Chart,
    Series,
    forest_plot,
    line_chart,
    timestep_chart,
)
from selfalign.pages.render import render
from selfalign.records import convert, read_plain
from selfalign.study.grid import Effect, Row, Table
from selfalign.study.grids import GRIDS
from selfalign.study.paper import PAPER, QUESTION, TWO_BY_TWO
from selfalign.study.plan import Study
from selfalign.study.profiles import PROFILES
from selfalign.study.report import pictures, provenance
from selfalign.study.results import METRICS, RUNS, StudyResults, read_results
from selfalign.study.statistics import GAP, Analysis, Trend, analyse
from selfalign.study.verdicts import EffectEstimate

REPORT_FILE = "report.html"
NUMBERS_FILE = "report.json"


@dataclass(frozen=True)
class EffectPanel:
    """All that is shown of one effect."""

    effect: Effect
    estimates: Sequence[EffectEstimate]
    by_timestep: Chart | None
    with_less: Mapping[float, Sequence[Trend]]
    """What losses and distances say at each smaller share of the training images."""

    @property
    def title(self) -> str:
        """Of its tab."""
        return self.effect.title

    @property
    def headline(self) -> list[EffectEstimate]:
        """Those that were named beforehand; where none was, of the first metric."""
        return [e for e in self.estimates if e.headline] or list(self.estimates[:1])


@dataclass(frozen=True)
class CurvesPanel:
    """The learning curves of variants that are to be read together."""

    title: str
    series: Sequence[Series]
    figures: Sequence[Chart]


class _Runs(msgspec.Struct):
    done: list[str] = []


class _Earlier(msgspec.Struct):
    """What counts of an earlier report.json."""

    runs: _Runs = msgspec.field(default_factory=_Runs)


def write_report(folder: Path) -> Path:
    """Write report.html and report.json of a study, finished or not.

    Args:
        folder: the study's.

    Returns:
        The path of report.html.

    Raises:
        UserError: there is no study, it holds the numbers of runs that are not here, or the files cannot
            be written.
    """
    results = read_results(folder)
    numbers_file = folder / NUMBERS_FILE
    require_no_folder(folder / REPORT_FILE, numbers_file)
    if not results.done and not (folder / RUNS).exists() and numbers_file.exists():
        plain = read_plain(numbers_file, finite=False)
        earlier = convert(plain, _Earlier, f"{numbers_file} cannot be read")
        raise UserError(
            f"{folder} holds the numbers of {len(earlier.runs.done)} runs and none of the runs: a report "
            "made here would be empty; make it where the runs are"
        )
    analysis = analyse(results)
    page = _render(folder, results, analysis)
    content = _numbers(results, analysis)
    text = json.dumps(content, indent=1, default=lambda value: value.as_json()) + "\n"
    write_whole(numbers_file, lambda path: path.write_text(text))
    write_whole(folder / REPORT_FILE, lambda path: path.write_bytes(page))
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
        "answers": {
            panel.title: {e.metric: e.verdict or e.finding for e in panel.headline}
            for panel in _effects(analysis, study)
        },
        **analysis.as_json(),
    }


def _render(folder: Path, results: StudyResults, analysis: Analysis) -> bytes:
    study, grid = results.study, results.study.grid
    jobs = provenance.representatives(study)
    of_paper = grid.name in (PAPER.name, TWO_BY_TWO.name)
    styles = {
        name: style for style, name in enumerate(dict.fromkeys([grid.baseline, *grid.variants]))
    }
    full = [run for run in results.done if run.train_fraction == study.full_fraction]
    every = Table(f"All variants of {grid.name}", tuple(map(Row, grid.variants)))
    return render(
        "selfalign.study.report",
        "report.html.j2",
        results=results,
        study=study,
        grid=grid,
        built_in=grid.name in GRIDS,
        of_paper=of_paper or grid.name not in GRIDS,
        analysis=analysis,
        metrics=METRICS,
        profile=PROFILES.get(study.profile),
        total=len(study.jobs()),
        title=QUESTION
        if grid.name in (PAPER.name, "2x2")
        else f"What sets the variants of {grid.name} apart?",
        verdicts=Counter(e.verdict for e in analysis.effects if e.verdict),
        facts=_facts(results),
        forests=_forests(analysis),
        effects=_effects(analysis, study),
        tables=grid.tables or (every,),
        beside_paper=any(row.paper for table in grid.tables for row in table.rows),
        curves=_curves(analysis, study, styles),
        efficiency=_efficiency(analysis, study, styles),
        strips=pictures.sample_strips(folder, full, study.seeds[0], pictures.find_data(jobs)),
        **_diagrams(jobs),
        settings=provenance.settings(jobs, results.done),
        versions=provenance.versions(results.done),
        study_command=provenance.study_command(study),
        train_commands={job.variant: provenance.train_command(study, job) for job in jobs},
        selfalign_version=selfalign.__version__,
    )


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


_COLOURED = ("helps", "hurts", "equal")
"""Findings that have a colour, of their own name."""


def _bar(estimate: EffectEstimate, label: str) -> Bar:
    assert estimate.difference is not None
    note = f"{numbers.signed(estimate.difference.mean, 2)}, {estimate.verdict or estimate.finding}"
    kind = estimate.finding if estimate.finding in _COLOURED else "unsure"
    margin = max(0.0, estimate.margin or 0.0)  # half of a gain that is none is no margin
    return Bar(label, estimate.difference, kind, note, margin)


def _forests(analysis: Analysis) -> list[Chart]:
    forests = []
    for metric in analysis.headline:
        found = [e for e in analysis.effects if e.metric == metric and e.difference]
        if found:
            title, bars = METRICS[metric].title, [_bar(e, e.effect.title) for e in found]
            told = "; ".join(f"{bar.label} {numbers.plus_minus(bar.difference)}" for bar in bars)
            description = f"Effects on the {title}, with intervals: {told}"
            svg = forest_plot(bars, METRICS[metric].better, description)
            forests.append(Chart(f"Effects on the {title}", svg, METRICS[metric].explanation))
    return forests


def _effects(analysis: Analysis, study: Study) -> list[EffectPanel]:
    panels = []
    for effect in study.grid.effects:
        bins = analysis.by_timestep.get(effect.title, ())
        title = f"{effect.title}: difference of the held-out loss over t"
        bars = [_bar(estimate, str(k)) for k, estimate in enumerate(bins)]
        caption = (
            "With minus without, in ten bins of the timestep; below zero is better. Exploratory."
        )
        figure = Chart(title, timestep_chart(bars, title), caption) if bars else None
        estimates = [e for e in analysis.effects if e.effect == effect]
        trends = [t for t in analysis.trends if t.effect == effect and t.metric != GAP]
        with_less = {
            share: found
            for share in sorted(study.train_fractions, reverse=True)[1:]
            if (found := [trend for trend in trends if share in trend.by_fraction])
        }
        panels.append(EffectPanel(effect, estimates, figure, with_less))
    return panels


def _curves(analysis: Analysis, study: Study, styles: Mapping[str, int]) -> list[CurvesPanel]:
    grid = study.grid
    groups = {table.title: {row.variant for row in table.rows} for table in grid.tables} or {
        "All variants": set(grid.variants)
    }
    panels = []
    for title, members in groups.items():
        variants = [name for name in grid.variants if name in members or name == grid.baseline]
        for fraction, by_metric in analysis.curves.items():
            figures: list[Chart] = []
            shown: dict[str, Series] = {}
            for metric, curves in by_metric.items():
                lines = [
                    Series(name, styles[name], curves[name]) for name in variants if name in curves
                ]
                if lines:
                    shown |= {line.name: line for line in lines}
                    label = METRICS[metric].title
                    figures.append(Chart(label, line_chart(lines, "step", label)))
            if figures:
                of_data = (
                    f", {100 * fraction:g} % of the images" if len(analysis.curves) > 1 else ""
                )
                panels.append(CurvesPanel(title + of_data, list(shown.values()), figures))
    return panels


def _efficiency(
    analysis: Analysis, study: Study, styles: Mapping[str, int]
) -> list[tuple[str, Chart, list[Series]]]:
    """By metric, the curves over shares of the training images."""
    found = []
    for metric, variants in analysis.efficiency.items():
        lines = [Series(name, styles[name], list(p.items())) for name, p in variants.items() if p]
        if lines:
            title, shares = METRICS[metric].title, sorted(study.train_fractions)
            svg = line_chart(lines, "share of the training images", title, shares)
            found.append((metric, Chart(title, svg), lines))
    return found


def _diagrams(jobs: Sequence[Any]) -> dict[str, Any]:
    """The diagrams, or why there are none."""
    try:
        return {"diagrams": pictures.view_diagrams(jobs), "no_diagrams": ""}
    except UserError as error:
        return {"diagrams": [], "no_diagrams": str(error)}

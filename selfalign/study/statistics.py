"""Everything that the report of a study shows, as numbers, from the runs that are done."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from selfalign.study.costs import QualityCost, quality_cost
from selfalign.study.estimates import Estimate, Layout, own_spread
from selfalign.study.grid import Effect, choosing_seeds
from selfalign.study.plan import Registration
from selfalign.study.ratios import Ratio, SeparationCost, ratio, separation_cost
from selfalign.study.results import BEST, DISTANCES, METRICS, RunResult, StudyResults
from selfalign.study.verdicts import (
    HELDOUT_LOSS,
    EffectEstimate,
    Finding,
    adjust,
    estimate_effect,
    margin_weights,
    register,
)

GAP = "generalisation_gap"
SEPARATED_LOSS = "heldout_separated"

Reading = Callable[[RunResult], float | None]
"""A number of a finished run, or None where it was not measured."""
Curve = Sequence[tuple[int, Estimate]]
"""(step, mean over seeds)."""


def metric_reading(name: str) -> Reading:
    """The final value of a metric of METRICS."""
    return lambda run: run.metrics.get(name)


def timestep_reading(index: int) -> Reading:
    """The final held-out loss in one of the bins of t, counted from 0."""
    return lambda run: (
        run.heldout_by_timestep[index] if index < len(run.heldout_by_timestep) else None
    )


def lay_out(
    runs: Iterable[RunResult],
    reading: Reading,
    by: Callable[[RunResult], Hashable] = lambda run: run.variant,
) -> Layout:
    """A reading by variant (or whatever `by` says) and seed. What diverged counts as not measured."""
    found = {(by(run), run.seed): reading(run) for run in runs}
    return Layout({k: v for k, v in found.items() if v is not None and math.isfinite(v)})


def variant_mean(runs: Iterable[RunResult], variant: str, reading: Reading) -> Estimate | None:
    """A variant's mean over its finished seeds, with its own spread; None while there is none."""
    values = {
        seed: v for (name, seed), v in lay_out(runs, reading).values.items() if name == variant
    }
    return own_spread(values) if values else None


def mean_curve(runs: Iterable[RunResult], variant: str, metric: str) -> Curve:
    """A variant's learning curve: at every measured step, the mean over the seeds that have it."""
    by_step: dict[int, dict[int, float]] = {}
    for run in runs:
        if run.variant == variant:
            for step, value in run.curves.get(metric, ()):
                if math.isfinite(value):
                    by_step.setdefault(step, {})[run.seed] = value
    return [(step, own_spread(by_step[step])) for step in sorted(by_step)]


@dataclass(frozen=True)
class Trend:
    """How an effect on one metric changes from the largest train fraction to the smallest."""

    effect: Effect
    metric: str
    by_fraction: Mapping[float, Estimate]
    change: Estimate | None
    """The difference at the smallest fraction minus that at the largest, seed by seed."""

    @property
    def finding(self) -> Finding:
        """Whether the effect is worth more with less data: it helps, then."""
        gain = self.change.interval() if self.change else None
        if gain is None or gain[0] <= 0 <= gain[1]:
            return "cannot be told"
        return "helps" if (gain[0] > 0) == (METRICS[self.metric].better == "higher") else "hurts"

    def as_json(self) -> dict[str, Any]:
        """The effect at every fraction, and its change."""
        return {
            "effect": self.effect.title,
            "metric": self.metric,
            "by_fraction": _by_share(self.by_fraction),
            "change": self.change,
        }


def effect_trend(
    runs: Sequence[RunResult], effect: Effect, metric: str, fractions: Sequence[float]
) -> Trend:
    """An effect at every train fraction, and how it differs between the two ends."""
    layout = lay_out(runs, metric_reading(metric), lambda run: (run.variant, run.train_fraction))

    def weights(fraction: float, sign: float) -> dict[Hashable, float]:
        return {(name, fraction): sign * weight for name, weight in effect.weights.items()}

    found = {fraction: layout.weigh(weights(fraction, 1)) for fraction in sorted(fractions)}
    ends = (min(fractions), max(fractions))  # of the sweep, not of what happens to be finished
    change = layout.weigh(weights(ends[0], 1) | weights(ends[1], -1)) if ends[0] < ends[1] else None
    return Trend(effect, metric, {k: e for k, e in found.items() if e is not None}, change)


@dataclass(frozen=True)
class Analysis:
    """Everything that the report of a study shows, as numbers."""

    metrics: tuple[str, ...]
    """Names of METRICS that were measured."""
    headline: tuple[str, ...]
    """The held-out loss and a Fréchet distance, as far as they were measured."""
    registration: Registration | None
    """By which claims were tested."""
    registered: bool
    """Whether that was laid down before anything ran."""
    means: Mapping[str, Mapping[str, Estimate]]
    """By variant and metric, at the largest train fraction."""
    heldout_images: Mapping[str, float]
    """By metric, what as many real held-out images score as there were samples; where measured."""
    effects: tuple[EffectEstimate, ...]
    """Every effect on every metric, at the largest train fraction."""
    by_timestep: Mapping[str, tuple[EffectEstimate, ...]]
    """An effect's differences of the held-out loss in equal bins of t, by its title."""
    curves: Mapping[float, Mapping[str, Mapping[str, Curve]]]
    """By train fraction, the largest first, metric and variant."""
    costs: tuple[QualityCost, ...]
    """Empty under a learning rate that falls: what is on the way there has not come down yet."""
    efficiency: Mapping[str, Mapping[str, Mapping[float, Estimate]]]
    """By metric, variant and train fraction; empty if only one was trained on."""
    trends: tuple[Trend, ...]
    separations: Mapping[float, Sequence[SeparationCost]]
    """What separation costs, by train fraction."""
    shares: Mapping[tuple[str, str], Mapping[str, Ratio]]
    """Which share of an effect's difference another's is: by both titles and headline metric."""
    tuned: Mapping[str, str]
    """The variant that was chosen, by tuned name."""
    reliance: Mapping[str, Sequence[Estimate]]
    """Label reliance in equal bins of t, by variant."""

    @property
    def exploratory(self) -> int:
        """Intervals in the report that no test named beforehand: chances to be wrong."""
        found = [e.difference for e in self.effects if not e.headline]
        found += [e.difference for bins in self.by_timestep.values() for e in bins]
        found += [e for trend in self.trends for e in (*trend.by_fraction.values(), trend.change)]
        return sum(e is not None and e.standard_error is not None for e in found)

    def as_json(self) -> dict[str, Any]:
        """What report.json holds of it; estimates say themselves what they hold."""
        curves = {fraction: _curves_as_json(found) for fraction, found in self.curves.items()}
        return {
            "metrics": {name: METRICS[name].title for name in self.metrics},
            "headline_metrics": self.headline,
            "registered_beforehand": self.registered,
            "means": self.means,
            "heldout_images": self.heldout_images,
            "effects": self.effects,
            "effects_by_timestep": {
                title: [estimate.difference for estimate in bins]
                for title, bins in self.by_timestep.items()
            },
            "curves": next(iter(curves.values())),
            "curves_by_train_fraction": _by_share(curves) if len(curves) > 1 else {},
            "compute_to_quality": self.costs,
            "sample_efficiency": {
                metric: {variant: _by_share(points) for variant, points in variants.items()}
                for metric, variants in self.efficiency.items()
            },
            "effects_by_train_fraction": self.trends,
            "separation_costs": _by_share(self.separations),
            "shares": [
                {"part": part, "whole": whole, "metric": metric, **asdict(found)}
                for (part, whole), by_metric in self.shares.items()
                for metric, found in by_metric.items()
            ],
            "tuned": self.tuned,
            "label_reliance_by_timestep": self.reliance,
            "exploratory_intervals": self.exploratory,
        }


def _curves_as_json(curves: Mapping[str, Mapping[str, Curve]]) -> dict[str, Any]:
    return {
        metric: {
            variant: [{"step": step, **mean.as_json()} for step, mean in curve]
            for variant, curve in of_metric.items()
        }
        for metric, of_metric in curves.items()
    }


def _by_share(points: Mapping[float, Any]) -> dict[str, Any]:
    return {f"{fraction:g}": estimate for fraction, estimate in points.items()}


def analyse(results: StudyResults) -> Analysis:
    """All statistics of a study, from the runs that are done."""
    study, runs = results.study, results.done
    grid = study.grid
    full = [run for run in runs if run.train_fraction == study.full_fraction]
    metrics = tuple(name for name in METRICS if any(name in run.metrics for run in runs))
    distance = next((name for name in DISTANCES if name in metrics), "")
    headline = tuple(name for name in (HELDOUT_LOSS, distance) if name in metrics)
    registration = study.registration or register(grid, distance or DISTANCES[0], len(study.seeds))
    curve_metrics = [name for name in METRICS if any(run.curves.get(name) for run in runs)]
    swept: tuple[str, ...] = ()
    if len(study.train_fractions) > 1:
        swept = (*headline, *(name for name in (BEST, GAP) if name in metrics))

    def layout(name: str, some: Sequence[RunResult] = full) -> Layout:
        return Layout(lay_out(some, metric_reading(name)).values, results.pair_errors(some, name))

    layouts = {name: layout(name) for name in metrics}
    choosing = study.seeds[: choosing_seeds(len(study.seeds))]
    losses = layouts.get(HELDOUT_LOSS, Layout({}))
    tuned = choose_tuned(grid.tuned, losses, choosing)
    judging = [seed for seed in study.seeds if seed not in choosing]
    of_tuned = {(name, seed): chosen for name, chosen in tuned.items() for seed in judging}

    def estimate(effect: Effect, metric: str) -> EffectEstimate:
        pool = grid.pool(effect)
        part = layouts[metric].of(of_tuned if set(pool) == set(grid.tuned) else pool)
        margin = (
            margin_weights(effect, metric, grid.effects, registration) if registration else None
        )
        return estimate_effect(part, effect, metric, margin)

    effects = [estimate(effect, name) for effect in grid.effects for name in metrics]
    return Analysis(
        metrics=metrics,
        headline=headline,
        registration=registration,
        registered=study.registration is not None,
        means={
            variant: {
                name: mean
                for name in metrics
                if (mean := variant_mean(full, variant, metric_reading(name)))
            }
            for variant in grid.variants
        },
        heldout_images={
            name: math.fsum(values) / len(values)
            for name in metrics
            if (values := [run.heldout_images[name] for run in full if name in run.heldout_images])
        },
        effects=tuple(adjust(effects, registration) if registration else effects),
        by_timestep={
            effect.title: bins
            for effect in grid.effects
            if (bins := _by_timestep(full, effect, grid.pool(effect)))
        },
        curves={
            fraction: {
                name: {
                    variant: curve
                    for variant in grid.variants
                    if (curve := mean_curve(_of(runs, fraction), variant, name))
                }
                for name in curve_metrics
            }
            for fraction in sorted(study.train_fractions, reverse=True)
        },
        costs=tuple(
            cost
            for name in curve_metrics
            for variant in grid.variants
            if study.constant_rate and (cost := quality_cost(full, variant, grid.baseline, name))
        ),
        efficiency={
            name: {
                variant: {
                    fraction: mean
                    for fraction in sorted(study.train_fractions)
                    if (mean := variant_mean(_of(runs, fraction), variant, metric_reading(name)))
                }
                for variant in grid.variants
            }
            for name in swept
        },
        trends=tuple(
            effect_trend(runs, effect, name, study.train_fractions)
            for effect in grid.effects
            for name in swept
            if not set(effect.weights) & set(grid.tuned)
        ),
        separations={
            fraction: [
                found
                for pair in grid.separations
                if (found := separation_cost(*pair, *(one.of(grid.pool_of(pair)) for one in both)))
            ]
            for fraction in sorted(study.train_fractions)
            if grid.separations and SEPARATED_LOSS in metrics
            for both in [[layout(n, _of(runs, fraction)) for n in (HELDOUT_LOSS, SEPARATED_LOSS)]]
        },
        shares={pair: _shares(pair, effects, headline) for pair in grid.shares},
        tuned=tuned,
        reliance={
            variant: means for variant in grid.variants if (means := _reliance(full, variant))
        },
    )


def choose_tuned(
    tuned: Mapping[str, Sequence[str]], losses: Layout, seeds: Sequence[int]
) -> dict[str, str]:
    """The variant that each tuned name stands for: the best at the study's choosing seeds.

    Args:
        tuned: the variants to choose from, by tuned name.
        losses: the held-out losses.
        seeds: those that choose.

    Returns:
        By tuned name; without those of whose variants none has all the seeds.
    """
    chosen = {}
    for name, candidates in tuned.items():
        means = {
            candidate: math.fsum(losses.values.get((candidate, seed), math.inf) for seed in seeds)
            for candidate in candidates
        }
        best = min(means, key=means.__getitem__)
        if math.isfinite(means[best]):
            chosen[name] = best
    return chosen


def _shares(
    pair: tuple[str, str], effects: Iterable[EffectEstimate], metrics: Iterable[str]
) -> dict[str, Ratio]:
    """By metric, which share of the second effect's difference the first one's is."""
    known = {(e.effect.title, e.metric): e.difference for e in effects if e.difference}
    found = {}
    for metric in metrics:
        part, whole = (known.get((title, metric)) for title in pair)
        share = ratio(part.values, whole.values) if part and whole else None
        if share is not None:
            found[metric] = share
    return found


def _reliance(runs: Sequence[RunResult], variant: str) -> list[Estimate]:
    """A variant's label reliance in equal bins of t; none where it was not measured."""
    by_seed = {run.seed: run.reliance_by_timestep for run in runs if run.variant == variant}
    bins = max(map(len, by_seed.values()), default=0)
    values = [{seed: v[k] for seed, v in by_seed.items() if len(v) == bins} for k in range(bins)]
    return [own_spread(value) for value in values]


def _of(runs: Iterable[RunResult], fraction: float) -> list[RunResult]:
    return [run for run in runs if run.train_fraction == fraction]


def _by_timestep(
    runs: Sequence[RunResult], effect: Effect, pool: Sequence[str]
) -> tuple[EffectEstimate, ...]:
    """One estimate per bin of t; none while a bin lacks it, or of tuned variants."""
    bins = max((len(run.heldout_by_timestep) for run in runs), default=0)
    found = [
        estimate_effect(lay_out(runs, timestep_reading(k)).of(pool), effect, HELDOUT_LOSS)
        for k in range(bins)
    ]
    return tuple(found) if all(e.difference for e in found) else ()

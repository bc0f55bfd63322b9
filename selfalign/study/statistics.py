"""What the runs of a study say together: means, paired effects and costs, with intervals over seeds.

Runs of one seed share initial weights, data order and noise. A difference of two variants is therefore
taken seed by seed, and its interval is that of the mean of those differences.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from scipy.special import stdtrit

from selfalign.study.grid import Effect
from selfalign.study.results import DISTANCES, METRICS, RunResult, StudyResults

CONFIDENCE = 0.95
HELDOUT_LOSS = "heldout_loss"

Reading = Callable[[RunResult], float | None]
"""A number of a finished run, or None where it was not measured."""
Outcome = Literal["helps", "hurts", "cannot be told"]
Verdict = Literal["supported", "contradicted", "undecided"]


@dataclass(frozen=True)
class SeedMean:
    """A mean over one or more seeds, and its t-interval at 95 %."""

    values: Mapping[int, float]
    """By seed."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return math.fsum(self.values.values()) / len(self.values)

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width: t(S-1)·s/√S. None at one seed, which has no spread."""
        seeds = len(self.values)
        if seeds < 2:
            return None
        variance = math.fsum((v - self.mean) ** 2 for v in self.values.values()) / (seeds - 1)
        return float(stdtrit(seeds - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / seeds)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper end of the interval; None at one seed."""
        half = self.half_width
        return None if half is None else (self.mean - half, self.mean + half)

    @property
    def agreeing(self) -> int:
        """Seeds whose value has the sign of the mean."""
        return sum(value * self.mean > 0 for value in self.values.values())

    def as_json(self) -> dict[str, Any]:
        """Mean, interval and the values behind them."""
        return {"mean": self.mean, "interval": self.interval, "by_seed": dict(self.values)}


def metric_reading(name: str) -> Reading:
    """The final value of a metric of METRICS."""
    return lambda run: run.metrics.get(name)


def timestep_reading(index: int) -> Reading:
    """The final held-out loss in one of the bins of t, counted from 0."""
    return lambda run: (
        run.heldout_by_timestep[index] if index < len(run.heldout_by_timestep) else None
    )


def _read(runs: Iterable[RunResult], reading: Reading) -> dict[tuple[str, int], float]:
    """Finite values by (variant, seed). What diverged counts as not measured."""
    found = {(run.variant, run.seed): reading(run) for run in runs}
    return {
        key: value for key, value in found.items() if value is not None and math.isfinite(value)
    }


def variant_mean(runs: Iterable[RunResult], variant: str, reading: Reading) -> SeedMean | None:
    """A variant's mean over its finished seeds; None while there is none."""
    values = {seed: v for (name, seed), v in _read(runs, reading).items() if name == variant}
    return SeedMean(values) if values else None


@dataclass(frozen=True)
class Difference:
    """With minus without, averaged over an effect's contrasts in each seed, then over the seeds."""

    difference: SeedMean
    without: float
    """Mean of the variants without, over the same seeds: what the difference is relative to."""


def paired_difference(
    runs: Iterable[RunResult], effect: Effect, reading: Reading
) -> Difference | None:
    """An effect on one reading, from the seeds of which all the runs are there.

    Args:
        runs: finished runs of one train fraction.
        effect: its contrasts say which variants are subtracted.
        reading: what is compared.

    Returns:
        None while no seed is complete.
    """
    read = _read(runs, reading)
    differences, references = {}, {}
    for seed in sorted({seed for _, seed in read}):
        pairs = [(read.get((a, seed)), read.get((b, seed))) for a, b in effect.contrasts]
        whole = [(a, b) for a, b in pairs if a is not None and b is not None]
        if pairs and len(whole) == len(pairs):
            differences[seed] = sum(a - b for a, b in whole) / len(whole)
            references[seed] = sum(b for _, b in whole) / len(whole)
    if not differences:
        return None
    return Difference(SeedMean(differences), SeedMean(references).mean)


def gain_interval(metric: str, difference: SeedMean) -> tuple[float, float] | None:
    """The interval of a difference, turned so that a gain is positive; None at one seed."""
    if difference.interval is None:
        return None
    low, high = difference.interval
    return (low, high) if METRICS[metric].better == "higher" else (-high, -low)


def outcome(metric: str, difference: SeedMean) -> Outcome:
    """Which way a difference falls, if its interval excludes zero."""
    interval = gain_interval(metric, difference)
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "cannot be told"
    return "helps" if interval[0] > 0 else "hurts"


@dataclass(frozen=True)
class EffectEstimate:
    """An effect on one metric."""

    effect: Effect
    metric: str
    estimate: Difference | None
    """None while no seed has all the runs."""

    @property
    def outcome(self) -> Outcome:
        """Helps, hurts, or cannot be told."""
        if self.estimate is None:
            return "cannot be told"
        return outcome(self.metric, self.estimate.difference)

    @property
    def verdict(self) -> Verdict | None:
        """Whether the paper's claim holds here; None where it makes none.

        A claim of no gain is supported by an interval that lies on the side of harm alone. An interval
        around zero leaves it undecided: it bounds a gain, and does not show that there is none.
        """
        if not self.effect.expected:
            return None
        if self.outcome == "cannot be told":
            return "undecided"
        helps = self.outcome == "helps"
        return "supported" if helps == (self.effect.expected == "gain") else "contradicted"

    def as_json(self) -> dict[str, Any]:
        """The estimate and what follows from it."""
        found = self.estimate
        return {
            "effect": self.effect.title,
            "metric": self.metric,
            "difference": None if found is None else found.difference.as_json(),
            "without": None if found is None else found.without,
            "outcome": self.outcome,
            "paper": self.verdict,
        }


Curve = Sequence[tuple[int, SeedMean]]
"""(step, mean over seeds)."""


def mean_curve(runs: Iterable[RunResult], variant: str, metric: str) -> Curve:
    """A variant's learning curve: at every measured step, the mean over the seeds that have it."""
    by_step: dict[int, dict[int, float]] = {}
    for run in runs:
        if run.variant == variant:
            for step, value in run.curves.get(metric, ()):
                if math.isfinite(value):
                    by_step.setdefault(step, {})[run.seed] = value
    return [(step, SeedMean(by_step[step])) for step in sorted(by_step)]


def first_reaching(
    curve: Sequence[tuple[int, float]], target: float, better: Literal["lower", "higher"]
) -> float | None:
    """The step at which a curve first reaches a value, linear between its points.

    Returns:
        None if it never does. A curve that is there at its first point counts from that point.
    """
    sign = 1 if better == "higher" else -1
    previous: tuple[int, float] | None = None
    for step, value in curve:
        if sign * (value - target) >= 0:
            if previous is None or value == previous[1]:
                return float(step)
            before, below = previous
            return before + (step - before) * (target - below) / (value - below)
        previous = (step, value) if math.isfinite(value) else previous
    return None


@dataclass(frozen=True)
class QualityCost:
    """What a variant needs until its curve first reaches the baseline's last value of the same seed."""

    variant: str
    metric: str
    steps: Mapping[int, float | None]
    """By seed; None is not reached."""
    flops: Mapping[int, float]
    """By seed, of those that reach it."""
    seconds: Mapping[int, float]
    """Likewise; training steps alone, each at the median of the variant's runs."""
    relative_flops: Mapping[int, float]
    """Operations as a share of those of the baseline's whole run of the same seed."""

    @property
    def reached(self) -> int:
        """Seeds that reach it."""
        return len(self.flops)

    def as_json(self) -> dict[str, Any]:
        """All of it, by seed."""
        return {
            "variant": self.variant,
            "metric": self.metric,
            "steps": dict(self.steps),
            "flops": dict(self.flops),
            "seconds": dict(self.seconds),
            "relative_flops": dict(self.relative_flops),
        }


def quality_cost(
    runs: Sequence[RunResult], variant: str, baseline: str, metric: str
) -> QualityCost | None:
    """See QualityCost; None while no seed has both curves."""
    curves = {
        (run.variant, run.seed): (run, run.curves[metric])
        for run in runs
        if run.variant in (variant, baseline) and run.curves.get(metric)
    }
    # A step costs the same at every seed; what else a machine did meanwhile does not count.
    paces = [run.seconds_per_step for (name, _), (run, _) in curves.items() if name == variant]
    steps: dict[int, float | None] = {}
    flops, seconds, relative = {}, {}, {}
    for seed in sorted({seed for _, seed in curves}):
        if (variant, seed) not in curves or (baseline, seed) not in curves:
            continue
        run, curve = curves[variant, seed]
        reference, target_curve = curves[baseline, seed]
        last_step, target = target_curve[-1]
        step = first_reaching(curve, target, METRICS[metric].better)
        steps[seed] = step
        if step is not None:
            flops[seed] = step * run.flops_per_step
            seconds[seed] = step * median(paces)
            relative[seed] = flops[seed] / (last_step * reference.flops_per_step)
    return QualityCost(variant, metric, steps, flops, seconds, relative) if steps else None


@dataclass(frozen=True)
class Trend:
    """How an effect on one metric changes from the largest train fraction to the smallest."""

    effect: Effect
    metric: str
    by_fraction: Mapping[float, Difference]
    change: SeedMean | None
    """The difference at the smallest fraction minus that at the largest, seed by seed."""

    def as_json(self) -> dict[str, Any]:
        """The effect at every fraction, and its change."""
        return {
            "effect": self.effect.title,
            "metric": self.metric,
            "by_fraction": {
                f"{fraction:g}": found.difference.as_json()
                for fraction, found in self.by_fraction.items()
            },
            "change": None if self.change is None else self.change.as_json(),
        }


def effect_trend(
    runs: Sequence[RunResult], effect: Effect, metric: str, fractions: Sequence[float]
) -> Trend:
    """An effect at every train fraction, and how it differs between the two ends."""
    by_fraction = {}
    for fraction in sorted(fractions):
        found = paired_difference(_of(runs, fraction), effect, metric_reading(metric))
        if found is not None:
            by_fraction[fraction] = found
    change: dict[int, float] = {}
    if len(fractions) > 1 and {min(fractions), max(fractions)} <= by_fraction.keys():
        small, large = (
            by_fraction[end(fractions)].difference.values for end in (min, max)
        )  # the ends of the sweep, not of what happens to be finished
        change = {seed: small[seed] - large[seed] for seed in small if seed in large}
    return Trend(effect, metric, by_fraction, SeedMean(change) if change else None)


@dataclass(frozen=True)
class Analysis:
    """Everything that the report of a study shows, as numbers."""

    metrics: tuple[str, ...]
    """Names of METRICS that were measured."""
    headline: tuple[str, ...]
    """The held-out loss and a Fréchet distance, as far as they were measured."""
    means: Mapping[str, Mapping[str, SeedMean]]
    """By variant and metric, at the largest train fraction."""
    effects: tuple[EffectEstimate, ...]
    """Every effect on every metric, at the largest train fraction."""
    by_timestep: Mapping[str, tuple[SeedMean, ...]]
    """An effect's differences of the held-out loss in equal bins of t, by its title."""
    curves: Mapping[str, Mapping[str, Curve]]
    """By metric and variant."""
    costs: tuple[QualityCost, ...]
    efficiency: Mapping[str, Mapping[str, Mapping[float, SeedMean]]]
    """By metric, variant and train fraction; empty if only one was trained on."""
    trends: tuple[Trend, ...]

    @property
    def intervals(self) -> int:
        """Intervals of differences in the report: how many chances there are to be wrong."""
        found = [e.estimate.difference for e in self.effects if e.estimate]
        found += [d for differences in self.by_timestep.values() for d in differences]
        found += [d.difference for trend in self.trends for d in trend.by_fraction.values()]
        found += [trend.change for trend in self.trends if trend.change]
        return sum(difference.interval is not None for difference in found)

    def as_json(self) -> dict[str, Any]:
        """What report.json holds of it."""
        return {
            "metrics": {name: METRICS[name].title for name in self.metrics},
            "headline_metrics": list(self.headline),
            "means": {
                variant: {metric: mean.as_json() for metric, mean in means.items()}
                for variant, means in self.means.items()
            },
            "effects": [estimate.as_json() for estimate in self.effects],
            "effects_by_timestep": {
                title: [difference.as_json() for difference in bins]
                for title, bins in self.by_timestep.items()
            },
            "curves": {
                metric: {
                    variant: [{"step": step, **mean.as_json()} for step, mean in curve]
                    for variant, curve in curves.items()
                }
                for metric, curves in self.curves.items()
            },
            "compute_to_quality": [cost.as_json() for cost in self.costs],
            "sample_efficiency": {
                metric: {
                    variant: {f"{fraction:g}": mean.as_json() for fraction, mean in points.items()}
                    for variant, points in variants.items()
                }
                for metric, variants in self.efficiency.items()
            },
            "effects_by_train_fraction": [trend.as_json() for trend in self.trends],
            "intervals_of_differences": self.intervals,
        }


def analyse(results: StudyResults) -> Analysis:
    """All statistics of a study, from the runs that are done."""
    study, runs = results.study, results.done
    grid, full = study.grid, _of(runs, study.full_fraction)
    metrics = tuple(name for name in METRICS if any(name in run.metrics for run in runs))
    frechet = [name for name in DISTANCES if name in metrics][:1]
    headline = tuple([HELDOUT_LOSS] * (HELDOUT_LOSS in metrics) + frechet)
    curve_metrics = [name for name in METRICS if any(run.curves.get(name) for run in full)]
    swept = len(study.train_fractions) > 1
    return Analysis(
        metrics=metrics,
        headline=headline,
        means={variant: _means(full, variant, metrics) for variant in grid.variants},
        effects=tuple(
            EffectEstimate(effect, name, paired_difference(full, effect, metric_reading(name)))
            for effect in grid.effects
            for name in metrics
        ),
        by_timestep={
            effect.title: bins for effect in grid.effects if (bins := _by_timestep(full, effect))
        },
        curves={
            name: {
                variant: curve
                for variant in grid.variants
                if (curve := mean_curve(full, variant, name))
            }
            for name in curve_metrics
        },
        costs=tuple(
            cost
            for name in curve_metrics
            for variant in grid.variants
            if (cost := quality_cost(full, variant, grid.baseline, name))
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
            for name in headline
            if swept
        },
        trends=tuple(
            effect_trend(runs, effect, name, study.train_fractions)
            for effect in grid.effects
            for name in headline
            if swept
        ),
    )


def _of(runs: Iterable[RunResult], fraction: float) -> list[RunResult]:
    return [run for run in runs if run.train_fraction == fraction]


def _means(runs: Sequence[RunResult], variant: str, metrics: Sequence[str]) -> dict[str, SeedMean]:
    means = {name: variant_mean(runs, variant, metric_reading(name)) for name in metrics}
    return {name: mean for name, mean in means.items() if mean is not None}


def _by_timestep(runs: Sequence[RunResult], effect: Effect) -> tuple[SeedMean, ...]:
    """One difference per bin of t; none while a bin lacks it."""
    bins = max((len(run.heldout_by_timestep) for run in runs), default=0)
    found = [paired_difference(runs, effect, timestep_reading(k)) for k in range(bins)]
    return tuple(d.difference for d in found if d) if all(found) else ()

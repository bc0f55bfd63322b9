"""What a variant needs to be as good as the baseline ends, with the seeds that never are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
from scipy import stats

from selfalign.study.results import METRICS, RunResult


def first_reaching(
    curve: Sequence[tuple[int, float]], target: float, better: Literal["lower", "higher", ""]
) -> int | None:
    """The first measured step at which a curve is as good as a value; None if it never is."""
    sign = 1 if better == "higher" else -1
    return next((step for step, value in curve if sign * (value - target) >= 0), None)


def median_time(times: Sequence[float], arrived: Sequence[bool]) -> float | None:
    """When half have arrived, by Kaplan and Meier; None where half never do.

    Args:
        times: of arrival, or until when there was none.
        arrived: whether it is an arrival. The others are censored: they might come later.
    """
    there = np.array(arrived, dtype=bool)
    if not there.any():
        return None
    observed = stats.CensoredData.right_censored(np.array(times, dtype=float), ~there)
    still_out = stats.ecdf(observed).sf
    below = still_out.quantiles[still_out.probabilities <= 0.5 + 1e-12]
    return float(below[0]) if len(below) else None


@dataclass(frozen=True)
class QualityCost:
    """What a variant needs until its curve first reaches the baseline's last value of the same seed."""

    variant: str
    metric: str
    steps: Mapping[int, int | None]
    """By seed; None is not reached."""
    censored_at: Mapping[int, int]
    """By seed, the last step that was measured."""
    median_steps: float | None
    """By Kaplan and Meier, seeds that never arrive included; None where half of them do not."""
    flops_per_step: float
    seconds_per_step: float
    """Median over the variant's runs."""
    baseline_flops: float
    """Of a whole run of the baseline."""

    @property
    def reached(self) -> int:
        """Seeds that reach it."""
        return sum(step is not None for step in self.steps.values())

    @property
    def relative_flops(self) -> float | None:
        """Operations at the median, as a share of those of the baseline's whole run; None where either is
        not known."""
        if self.median_steps is None or not self.baseline_flops:
            return None
        return self.median_steps * self.flops_per_step / self.baseline_flops

    def as_json(self) -> dict[str, Any]:
        """All of it, by seed."""
        return {**asdict(self), "relative_flops": self.relative_flops}


def quality_cost(
    runs: Sequence[RunResult], variant: str, baseline: str, metric: str
) -> QualityCost | None:
    """See QualityCost; None while no seed has both curves."""
    curves = {
        (run.variant, run.seed): (run, run.curves[metric])
        for run in runs
        if run.variant in (variant, baseline) and run.curves.get(metric)
    }
    seeds = sorted(seed for name, seed in curves if name == variant and (baseline, seed) in curves)
    if not seeds:
        return None
    own = [curves[variant, seed][0] for seed in seeds]
    steps, last = {}, {}
    for seed in seeds:
        curve = curves[variant, seed][1]
        steps[seed] = first_reaching(
            curve, curves[baseline, seed][1][-1][1], METRICS[metric].better
        )
        last[seed] = curve[-1][0]
    reference, curve = curves[baseline, seeds[0]]
    return QualityCost(
        variant,
        metric,
        steps,
        last,
        median_time(
            [last[seed] if step is None else step for seed, step in steps.items()],
            [step is not None for step in steps.values()],
        ),
        own[0].flops_per_step,
        # A step costs the same at every seed; what else a machine did meanwhile does not count.
        median([run.seconds_per_step for run in own]),
        curve[-1][0] * reference.flops_per_step,
    )

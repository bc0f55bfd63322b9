"""What becomes of a claim: supported, refuted, equal or undecided, against margins laid down beforehand.

All questions are asked of a gain: a difference turned so that more is better. Each verdict is a rejected
hypothesis, so that more data can turn any undecided claim either way:

- gain: the gain is above 0 (two-sided);
- small: the gain is below the margin (non-inferiority), the end of a 90 % interval; below 0 where the
  margin is not above it;
- equal: the gain lies within the margin on both sides (two one-sided tests);
- differs: the gain is not 0 (two-sided).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from scipy.special import nctdtr, nctdtrinc, stdtrit

from selfalign.study.estimates import Estimate, Layout
from selfalign.study.grid import Effect, Grid
from selfalign.study.plan import Registration
from selfalign.study.results import DISTANCES, METRICS

LEVEL = 0.05
POWER = 0.8
HELDOUT_LOSS = "heldout_loss"
MARGINS = {HELDOUT_LOSS: 0.01, **dict.fromkeys(DISTANCES, 0.05)}
"""Shares of the mean that an effect is relative to, below which a difference counts as none."""
HALF = 0.5
"""Share of another effect's gain that is the margin of an effect that is half of it."""

Hypothesis = Literal["gain", "small", "equal", "differs"]
HYPOTHESES: tuple[Hypothesis, ...] = ("gain", "small", "equal", "differs")
Finding = Literal["helps", "hurts", "rises", "falls", "equal", "cannot be told"]
Verdict = Literal["supported", "refuted", "equal", "undecided"]


def register(grid: Grid, distance: str, seeds: int) -> Registration | None:
    """The tests of a study, before it runs: every claim, on the held-out loss and a Fréchet distance.

    Args:
        grid: whose effects make claims.
        distance: the name of METRICS that will be measured.
        seeds: how many are planned.

    Returns:
        None where the grid claims nothing.
    """
    claimed = [effect for effect in grid.effects if effect.expected]
    metrics = tuple(name for name in (HELDOUT_LOSS, distance) if name in METRICS)
    tests = len(claimed) * len(metrics)
    if not tests:
        return None
    detectable = {}
    for effect in claimed:
        judging = grid.judging(effect, seeds)
        degrees = (len(grid.pool(effect)) - 1) * (judging - 1)
        if degrees > 0:  # of one seed, or half of one, nothing can be told
            error = unit_error(effect.weights, judging)
            detectable[effect.title] = smallest_detectable(error, degrees, LEVEL / tests)
    margins = {metric: MARGINS.get(metric, 0.05) for metric in metrics}
    titles = tuple(effect.title for effect in claimed)
    return Registration(titles, metrics, margins, LEVEL, seeds, detectable)


def unit_error(weights: Mapping[str, float], seeds: int) -> float:
    """Standard error of a weighted sum over seeds, for a residual of standard deviation 1."""
    return (sum(w * w for w in weights.values()) / seeds) ** 0.5


def smallest_detectable(
    standard_error: float, degrees: float, level: float = LEVEL, power: float = POWER
) -> float:
    """The smallest true effect that a two-sided test of `level` finds with a chance of `power`."""
    threshold = float(stdtrit(degrees, 1 - level / 2))
    return float(nctdtrinc(degrees, 1 - power, threshold)) * standard_error


def chance_of_equal(
    margin: float, standard_error: float, degrees: float, level: float = LEVEL
) -> tuple[float, float]:
    """Chances of finding "small" and "equal" where there is no difference at all.

    That of "equal" is the least that two one-sided tests can have.
    """
    threshold = float(stdtrit(degrees, 1 - level))
    small = 1 - float(nctdtr(degrees, margin / standard_error, threshold))
    return small, max(0.0, 2 * small - 1)


@dataclass(frozen=True)
class EffectEstimate:
    """An effect on one metric."""

    effect: Effect
    metric: str
    difference: Estimate | None = None
    """With minus without; None while no seed has all the runs."""
    reference: float = 0.0
    """Mean of the variants without: what the difference is relative to."""
    margin: float | None = None
    """As a gain in the metric's units, counted as 0 where it is below; None where none was laid down."""
    p_values: Mapping[Hypothesis, float] | None = None
    """None without a standard error."""
    adjusted: Mapping[Hypothesis, float] | None = None
    """By Holm over the headline tests; None where this is none of them, but a look at the data."""
    detectable: float | None = None
    """The smallest effect that a test like this finds with a chance of 80 %, given the error seen."""

    @property
    def headline(self) -> bool:
        """Whether it was named beforehand. All else is exploratory."""
        return self.adjusted is not None

    @property
    def finding(self) -> Finding:
        """What the data say of the difference, whatever was claimed; at 5 %, not adjusted."""
        found, p = self.difference, self.p_values
        if found is None or p is None:
            return "cannot be told"
        if p["equal"] <= LEVEL:
            return "equal"
        if p["differs"] > LEVEL:
            return "cannot be told"
        if not METRICS[self.metric].better:
            return "rises" if found.mean > 0 else "falls"
        return "helps" if p["gain"] <= LEVEL else "hurts"

    @property
    def verdict(self) -> Verdict | None:
        """What becomes of the claim; None where it makes none, or this is exploratory."""
        if not self.effect.expected or not self.headline:
            return None
        assert self.adjusted is not None
        shown = {name for name, p in self.adjusted.items() if p <= LEVEL}
        verdicts: Mapping[str, Sequence[tuple[Hypothesis, Verdict]]] = {
            "gain": (("equal", "equal"), ("gain", "supported"), ("small", "refuted")),
            "no gain": (("small", "supported"), ("gain", "refuted")),
            "equal": (("equal", "supported"), ("differs", "refuted")),
        }
        for hypothesis, verdict in verdicts[self.effect.expected]:
            if hypothesis in shown:
                return verdict
        return "undecided"

    def as_json(self) -> dict[str, Any]:
        """The estimate and what follows from it."""
        found = self.difference
        return {
            "effect": self.effect.title,
            "metric": self.metric,
            "difference": found,
            "interval_90": None if found is None else found.interval(1 - 2 * LEVEL),
            "without": self.reference if found else None,
            "margin": self.margin,
            "headline": self.headline,
            "p_values": self.p_values,
            "p_values_holm": self.adjusted,
            "smallest_detectable": self.detectable,
            "outcome": self.finding,
            "paper": self.verdict,
        }


def _combine(*terms: tuple[float, Mapping[str, float]]) -> dict[str, float]:
    """A weighted sum of weighted sums."""
    total: dict[str, float] = {}
    for factor, weights in terms:
        for name, weight in weights.items():
            total[name] = total.get(name, 0.0) + factor * weight
    return total


def estimate_effect(
    layout: Layout, effect: Effect, metric: str, margin: Mapping[str, float] | None = None
) -> EffectEstimate:
    """An effect on one metric, and its p-values.

    Args:
        layout: the metric by variant and seed.
        effect: says which variants are subtracted.
        metric: a name of METRICS.
        margin: as a weighted sum of variants' means, so that its own error counts; None for no margin.
    """
    sign = -1.0 if METRICS[metric].better == "lower" else 1.0
    difference = layout.weigh(effect.weights)
    reference = layout.weigh(effect.reference)
    if difference is None or reference is None:
        return EffectEstimate(effect, metric)
    of_margin = layout.weigh(margin) if margin else None
    known = EffectEstimate(
        effect, metric, difference, reference.mean, of_margin.mean if of_margin else None
    )
    if difference.standard_error is None:
        return known
    p = {
        side: _p(layout, (turn * sign, effect.weights)) for side, turn in (("up", 1), ("down", -1))
    }
    small = equal = 1.0
    if margin and of_margin is not None:
        # Half of no gain, or a share of a distance below 0, counts as 0: only a loss is below it.
        counted = margin if of_margin.mean > 0 else {}
        small = _p(layout, (-sign, effect.weights), (1, counted))
        equal = max(small, _p(layout, (sign, effect.weights), (1, counted)))
    return replace(
        known,
        p_values={
            "gain": min(1.0, 2 * p["up"]) if p["up"] < 0.5 else 1.0,
            "small": small,
            "equal": equal,
            "differs": min(1.0, 2 * min(p.values())),
        },
    )


def _p(layout: Layout, *terms: tuple[float, Mapping[str, float]]) -> float:
    found = layout.weigh(_combine(*terms))
    return 1.0 if found is None else found.p_above()


def margin_weights(
    effect: Effect, metric: str, effects: Iterable[Effect], registration: Registration
) -> dict[str, float] | None:
    """The margin of an effect on a metric as a weighted sum of variants; None without one."""
    sign = -1.0 if METRICS[metric].better == "lower" else 1.0
    if effect.half_of:
        whole = next(other for other in effects if other.title == effect.half_of)
        return _combine((HALF * sign, whole.weights))
    share = registration.margins.get(metric)
    return None if share is None else _combine((share, effect.reference))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down procedure."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def adjust(estimates: Sequence[EffectEstimate], registration: Registration) -> list[EffectEstimate]:
    """Mark the headline tests, with p-values adjusted for their number, hypothesis by hypothesis.

    Tests that cannot be made yet count as well, so that verdicts do not fade when they can.
    """
    headline = [
        e.effect.title in registration.effects and e.metric in registration.metrics
        for e in estimates
    ]
    count = len(registration.effects) * len(registration.metrics)
    tested = [e for e, named in zip(estimates, headline, strict=True) if named]
    raw = [e.p_values or dict.fromkeys(HYPOTHESES, 1.0) for e in tested]
    missing = [1.0] * (count - len(tested))
    by_hypothesis = {name: holm([p[name] for p in raw] + missing) for name in HYPOTHESES}
    adjusted = iter(
        [{name: by_hypothesis[name][k] for name in HYPOTHESES} for k in range(len(raw))]
    )
    found = []
    for estimate, named in zip(estimates, headline, strict=True):
        error = estimate.difference.standard_error if estimate.difference else None
        if error and estimate.difference:
            level = LEVEL / count if named else LEVEL
            size = smallest_detectable(error, estimate.difference.degrees, level)
            estimate = replace(estimate, detectable=size)
        found.append(replace(estimate, adjusted=next(adjusted)) if named else estimate)
    return found

"""Ratios of two means over seeds: which share of one effect another is, and what separation costs.

Numerator and denominator are known seed by seed, and correlated. The interval is Fieller's: all ratios r
for which numerator - r·denominator is not found to differ from 0, which holds its confidence where the
denominator is small as well, and then has no end.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from selfalign.study.estimates import CONFIDENCE, Estimate, Layout


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means."""

    value: float
    interval: tuple[float, float] | None
    """95 %; None where no ratio can be excluded, or one seed shows no spread."""


def ratio(numerator: Mapping[int, float], denominator: Mapping[int, float]) -> Ratio | None:
    """The ratio of the means over the seeds that both have, with Fieller's interval.

    Args:
        numerator, denominator: by seed.

    Returns:
        None without a common seed, or where the denominator is 0.
    """
    seeds = sorted(numerator.keys() & denominator.keys())
    a, b = (np.array([values[seed] for seed in seeds]) for values in (numerator, denominator))
    if not len(seeds) or not b.mean():
        return None
    value = float(a.mean() / b.mean())
    if len(seeds) < 2:
        return Ratio(value, None)
    threshold = stdtrit(len(seeds) - 1, (1 + CONFIDENCE) / 2) ** 2 / len(seeds)
    (aa, ab), (_, bb) = np.cov(a, b) * threshold
    # (ā - r·b̄)² ≤ t²·Var(a - r·b)/S is a quadratic inequality in r.
    first, half, last = b.mean() ** 2 - bb, a.mean() * b.mean() - ab, a.mean() ** 2 - aa
    root = half**2 - first * last
    if first <= 0:
        return Ratio(value, None)
    spread = math.sqrt(
        max(0.0, root)
    )  # below 0 by rounding alone: the inequality holds at the value
    ends = ((half - spread) / first, (half + spread) / first)
    return Ratio(value, (float(ends[0]), float(ends[1])))


@dataclass(frozen=True)
class SeparationCost:
    """What separated attention costs, scored in the variant's own way and on whole images."""

    separated: str
    whole: str
    own: Estimate
    """C_own: the separated variant's separated held-out loss, minus the whole one's whole held-out loss."""
    on_whole: Estimate
    """C_whole: both held-out losses on whole images."""
    recovered: Ratio | None
    """R = 1 - C_whole/C_own: the share of the cost that is gone where tokens see each other again."""

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "separated": self.separated,
            "whole": self.whole,
            "C_own": self.own,
            "C_whole": self.on_whole,
            "R": None if self.recovered is None else asdict(self.recovered),
        }


def separation_cost(
    first: str, second: str, whole: Layout, separated: Layout
) -> SeparationCost | None:
    """What separation costs a variant, as far as it is measured.

    Args:
        first: the variant with separated attention.
        second: the one without.
        whole: the held-out loss on whole images.
        separated: that with separated attention.
    """
    weights = {first: 1.0, second: -1.0}
    own = whole.replaced([first], separated).weigh(weights)
    on_whole = whole.weigh(weights)
    if own is None or on_whole is None:
        return None
    share = ratio(on_whole.values, own.values)
    if share is not None:
        ends = share.interval and (1 - share.interval[1], 1 - share.interval[0])
        share = Ratio(1 - share.value, ends)
    return SeparationCost(first, second, own, on_whole, share)

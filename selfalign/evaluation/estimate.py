"""A measured number with its standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

GROUPS = 10
"""Groups of samples for the jackknife and splits of the Inception Score."""


@dataclass(frozen=True)
class Estimate:
    """A metric's value and the standard error that the choice of samples gives it."""

    value: float
    standard_error: float

    @property
    def mean(self) -> float:
        """The value, by the name that charts know."""
        return self.value

    def half_width(self) -> float:
        """Half of the width of the 95 % interval."""
        return 1.96 * self.standard_error

    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval."""
        return self.value - self.half_width(), self.value + self.half_width()


def from_share(share: float, count: int) -> Estimate:
    """A share of `count` images. Its standard error is what a bootstrap over them tends to."""
    return Estimate(share, math.sqrt(share * (1 - share) / count))


def from_jackknife(value: float, without: Sequence[float]) -> Estimate:
    """A value over all samples, with the delete-a-group jackknife's standard error.

    Leaving one group out keeps most of the samples, so that metrics whose bias depends on their
    number (as the Fréchet distance's does) keep that bias in every term and it cancels.

    Args:
        value: the metric over all samples.
        without: the metric without the k-th of equally large groups, for every k.
    """
    count, mean = len(without), math.fsum(without) / len(without)
    spread = math.fsum((term - mean) ** 2 for term in without)
    return Estimate(value, math.sqrt((count - 1) / count * spread))


def from_independent(values: Sequence[float], independent: int | None = None) -> Estimate:
    """The mean of values measured on separate parts of the samples.

    Args:
        values: one per part.
        independent: how many of them count as independent, where parts overlap; None for all.
    """
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return Estimate(mean, math.sqrt(variance / (independent or len(values))))

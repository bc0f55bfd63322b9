"""Weighted sums of the variants' means, with what variant and seed leave unexplained as their error.

Runs of one seed share initial weights, data order and noise, so a difference is taken seed by seed. Three
differences hardly know their own spread; the layout of all variants × seeds does: y = variant + seed + e,
with one variance of e for the whole layout and (V-1)(S-1) degrees of freedom where no run is missing.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
Array = np.ndarray[Any, Any]
Cell = tuple[Hashable, int]
"""A variant (or whatever else runs differ in) and a seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and how sure it is."""

    values: Mapping[int, float]
    """By seed."""
    standard_error: float | None = None
    """None where nothing shows a spread."""
    degrees: float = 0.0
    """Degrees of freedom behind the standard error."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return math.fsum(self.values.values()) / len(self.values)

    def half_width(self, confidence: float = CONFIDENCE) -> float | None:
        """Half of the t-interval's width; None without a standard error."""
        if self.standard_error is None:
            return None
        return float(stdtrit(self.degrees, (1 + confidence) / 2)) * self.standard_error

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
        """Lower and upper end of the t-interval; None without a standard error."""
        half = self.half_width(confidence)
        return None if half is None else (self.mean - half, self.mean + half)

    def p_above(self) -> float:
        """p-value of the test that the mean is not above 0; 1 without a standard error."""
        if not self.standard_error:
            return float(self.standard_error is None or self.mean <= 0)
        return float(stdtr(self.degrees, -self.mean / self.standard_error))

    @property
    def agreeing(self) -> int:
        """Seeds whose value has the sign of the mean."""
        return sum(value * self.mean > 0 for value in self.values.values())

    def as_json(self) -> dict[str, Any]:
        """Mean, interval, and the values behind them."""
        return {
            "mean": self.mean,
            "interval": self.interval(),
            "standard_error": self.standard_error,
            "degrees_of_freedom": self.degrees,
            "by_seed": dict(self.values),
        }


def own_spread(values: Mapping[int, float]) -> Estimate:
    """A mean whose error is the spread of its own values over seeds: of one variant, say."""
    count = len(values)
    if count < 2:
        return Estimate(values)
    return Estimate(
        values, float(np.std(list(values.values()), ddof=1)) / math.sqrt(count), count - 1
    )


@dataclass(frozen=True)
class PairErrors:
    """Squared errors of all runs on the same pairs of a held-out image and a timestep."""

    by_run: Mapping[Cell, Float[Array, "P"]]
    images: Int[Array, "P"]
    """Which image each pair shows."""
    bins: Int[Array, "P"]
    """Stratum of t each pair lies in; all are of one size."""

    def variance(self, weights: Mapping[Any, float], seeds: Sequence[int]) -> tuple[float, float]:
        """What the choice of images adds to the variance of a weighted mean over seeds.

        Images and seeds are crossed: with u[s, i] = seed + image + e, the variance of the mean over both
        is (MS_seed + MS_image - MS_e)/(S·I). The first term is the layout's; this is the rest, at least
        0. It is what resampling seeds and images both tends to (arXiv:1106.2125), without its bias at few
        seeds.

        Returns:
            The variance, and its degrees of freedom.
        """
        errors = np.stack(
            [sum(w * self.by_run[name, seed] for name, w in weights.items()) for seed in seeds]
        )
        shape, pairs = (int(self.images.max()) + 1, len(seeds)), errors.shape[1]
        in_bin = np.eye(int(self.bins.max()) + 1)[self.bins]  # (P, bins)
        residuals = errors - (errors @ in_bin / in_bin.sum(axis=0)) @ in_bin.T
        by_image = np.zeros(shape)
        np.add.at(by_image, self.images, residuals.T * (shape[0] / pairs))
        count = shape[0]
        if count < 2:
            return 0.0, 1.0
        mean = by_image.mean(axis=1)
        of_images = float(np.sum(mean**2)) / (count * (count - 1))
        if len(seeds) < 2:
            return of_images, count - 1
        rest = float(np.sum((by_image - mean[:, None]) ** 2))
        of_both = rest / ((len(seeds) - 1) * (count - 1) * len(seeds) * count)
        return max(0.0, of_images - of_both), count - 1


@dataclass(frozen=True)
class Layout:
    """Values of one reading by variant and seed; some may be missing."""

    values: Mapping[Cell, float]
    errors: PairErrors | None = None
    """Of the held-out loss, where every run kept them."""
    seeds: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(sorted({seed for _, seed in self.values})))

    def of(self, names: Mapping[tuple[Any, int], Any] | Sequence[Any]) -> "Layout":
        """The part of the layout that some variants are, or cells under other names.

        Args:
            names: variants; or by new cell, (name, seed), the variant that stands in it.
        """
        if not isinstance(names, Mapping):
            names = {cell: cell[0] for cell in self.values if cell[0] in names}
        cells = {
            new: (name, new[1]) for new, name in names.items() if (name, new[1]) in self.values
        }
        kept = self.errors
        if kept is not None:
            runs = {new: kept.by_run[old] for new, old in cells.items() if old in kept.by_run}
            kept = replace(kept, by_run=runs)
        return Layout({new: self.values[old] for new, old in cells.items()}, kept)

    def replaced(self, names: Collection[Any], other: "Layout") -> "Layout":
        """The layout with some variants' values, and errors, from that of another reading."""

        def mixed(own: Mapping[Cell, Any], others: Mapping[Cell, Any]) -> dict[Cell, Any]:
            kept = {cell: value for cell, value in own.items() if cell[0] not in names}
            return kept | {cell: value for cell, value in others.items() if cell[0] in names}

        errors = None
        if self.errors is not None and other.errors is not None:
            errors = replace(self.errors, by_run=mixed(self.errors.by_run, other.errors.by_run))
        return Layout(mixed(self.values, other.values), errors)

    @cached_property
    def residual(self) -> tuple[float, int]:
        """Variance of what variant and seed leave unexplained, and its degrees of freedom."""
        names = list(dict.fromkeys(name for name, _ in self.values))
        design = np.zeros((len(self.values), len(names) + len(self.seeds)))
        for row, (name, seed) in enumerate(self.values):
            design[row, names.index(name)] = 1
            design[row, len(names) + self.seeds.index(seed)] = 1
        y = np.array(list(self.values.values()))
        if not len(y):
            return 0.0, 0
        solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
        degrees = len(y) - int(rank)
        rest = float(np.sum((y - design @ solution) ** 2))
        rounding = (1e-13 * float(np.abs(y).max())) ** 2 * len(y)
        return (rest / degrees if degrees and rest > rounding else 0.0), degrees

    def weigh(self, weights: Mapping[Any, float]) -> Estimate | None:
        """A weighted sum of variants, over the seeds that have all of them.

        Its error is the layout's residual, and where held-out errors were kept, that of the choice of
        images. Where the weights do not add up to 0, the seeds count as given.

        Returns:
            None while no seed is complete.
        """
        weights = {name: weight for name, weight in weights.items() if weight}
        values = {
            seed: math.fsum(w * self.values[name, seed] for name, w in weights.items())
            for seed in self.seeds
            if all((name, seed) in self.values for name in weights)
        }
        if not values or not weights:
            return None
        residual, degrees = self.residual
        if not degrees:
            return Estimate(values)
        variance = residual * math.fsum(w * w for w in weights.values()) / len(values)
        total, effective = variance, float(degrees)
        kept = self.errors
        if kept and all((name, seed) in kept.by_run for name in weights for seed in values):
            added, of_images = kept.variance(weights, list(values))
            total = variance + added
            if total:
                effective = total**2 / (variance**2 / degrees + added**2 / of_images)
        return Estimate(values, math.sqrt(total), effective)

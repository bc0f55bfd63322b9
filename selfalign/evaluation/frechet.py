"""The Fréchet distance of Gaussian fits, in double precision (FID: arXiv:1706.08500)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.errors import UserError
from selfalign.evaluation.estimate import GROUPS, Estimate, from_jackknife

CHUNK = 4096
"""Feature vectors converted to double precision at once."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features, in float64; the covariance as `np.cov` has it (over n-1)."""

    mean: Float[Tensor, "D"]
    covariance: Float[Tensor, "D D"]

    @functools.cached_property
    def spectrum(self) -> tuple[Float[Tensor, "D"], Float[Tensor, "D D"]]:
        """Eigenvalues of the covariance in ascending order, and its eigenvectors as columns."""
        eigenvalues, vectors = torch.linalg.eigh(self.covariance)
        return eigenvalues, vectors

    @functools.cached_property
    def factor(self) -> Float[Tensor, "D R"]:
        """F with F·Fᵀ = covariance, of as many columns as the covariance has rank.

        Eigenvalues that are zero but for rounding are left out: their square roots, about 1e-8,
        would add up over thousands of directions.
        """
        eigenvalues, vectors = self.spectrum
        largest = eigenvalues[-1].clamp(min=0)
        keep = eigenvalues > largest * len(eigenvalues) * torch.finfo(torch.float64).eps
        return vectors[:, keep] * eigenvalues[keep].sqrt()


class Moments:
    """Sums over feature vectors, from which their Gaussian follows whatever the order of adding.

    Args:
        origin: the sums are taken about this point; near the mean, nothing cancels.
    """

    def __init__(self, origin: Float[Tensor, "D"]) -> None:
        self.origin = origin.double()
        self.count = 0
        self.total = torch.zeros_like(self.origin)
        self.products = self.total.new_zeros(len(origin), len(origin))

    def add(self, features: Float[Tensor, "M D"]) -> None:
        """Take in more feature vectors."""
        for chunk in features.split(CHUNK):
            centred = chunk.double() - self.origin
            self.total += centred.sum(dim=0)
            self.products.addmm_(centred.T, centred)
        self.count += len(features)

    def combine(self, other: "Moments", sign: int = 1) -> "Moments":
        """The moments of both sets together, or with sign -1 of this one without the other."""
        combined = Moments(self.origin)
        combined.count = self.count + sign * other.count
        combined.total = self.total + sign * other.total
        combined.products = self.products + sign * other.products
        return combined

    def gaussian(self) -> Gaussian:
        """Mean and covariance. Needs two vectors or more."""
        shift = self.total / self.count
        covariance = (self.products - self.count * torch.outer(shift, shift)) / (self.count - 1)
        return Gaussian(self.origin + shift, covariance)


def fit(features: Float[Tensor, "M D"]) -> Gaussian:
    """The Gaussian of a set of features."""
    return _moments_by_group(features, groups=1)[0].gaussian()


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|μ₁-μ₂|² + tr(Σ₁ + Σ₂ - 2·(Σ₁Σ₂)^½).

    With Σ = F·Fᵀ the last trace is the sum of the singular values of F₁ᵀF₂, which exists for
    covariances of any rank: no square root of a nearly singular product can fail, and nothing has
    to be added to a diagonal.
    """
    difference = first.mean - second.mean
    overlap = torch.linalg.svdvals(first.factor.T @ second.factor).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return max(0.0, float(difference @ difference + traces - 2 * overlap))


def frechet_estimate(features: Float[Tensor, "M D"], reference: Gaussian) -> Estimate:
    """The Fréchet distance of samples from a reference, with a jackknife's standard error.

    The error is that of the samples; the reference counts as given.

    Raises:
        UserError: too few samples, NaN among them, or another number of features.
    """
    count, dimensions = features.shape
    if count < 2 * GROUPS:
        raise UserError(f"a Fréchet distance needs at least {2 * GROUPS} samples, here are {count}")
    if dimensions != len(reference.mean):
        raise UserError(
            f"the samples have {dimensions} features and the reference statistics "
            f"{len(reference.mean)}: they come from different networks"
        )
    groups = _moments_by_group(features, GROUPS)
    total = functools.reduce(Moments.combine, groups)
    without = [_quick_distance(total.combine(group, -1).gaussian(), reference) for group in groups]
    return from_jackknife(frechet_distance(total.gaussian(), reference), without)


SAMPLE_PARTS, REFERENCE_PARTS = (1, 2, 4), (1, 2)
"""Into how many equal parts samples and reference are cut, to see how the distance goes with their number."""


def extrapolated_distance(
    features: Float[Tensor, "M D"], reference: Float[Tensor, "R D"]
) -> Estimate:
    """The Fréchet distance that infinitely many samples and reference images would have.

    A distance of finite sets is too large by nearly a/n + b/m, for n samples and m reference images
    (arXiv:1911.07023 for the samples). The distances of all, halves and quarters of the samples from all
    and halves of the reference tell a and b by least squares. Where the sets are alike the result scatters
    about 0, on both sides.

    Returns:
        The distance, with a jackknife's standard error over the samples; the reference counts as given.

    Raises:
        UserError: fewer than twenty samples or reference images in a part, or NaN among them.
    """
    least = 2 * GROUPS
    for name, count, parts in (
        ("samples", len(features), SAMPLE_PARTS[-1]),
        ("reference images", len(reference), REFERENCE_PARTS[-1]),
    ):
        if count < least * parts:
            raise UserError(
                f"an extrapolated Fréchet distance needs at least {least * parts} {name}, here are {count}"
            )
    require_finite(features)
    require_finite(reference)
    fits = [
        (len(reference) / parts, fit(reference[part::parts]))
        for parts in REFERENCE_PARTS
        for part in range(parts)
    ]

    def distance(samples: Tensor) -> float:
        rows, distances = [], []
        for parts in SAMPLE_PARTS:
            for part in range(parts):
                gaussian = fit(samples[part::parts])
                for count, other in fits:
                    rows.append([1.0, parts / len(samples), 1 / count])
                    distances.append(_quick_distance(gaussian, other))
        design = torch.tensor(rows, dtype=torch.float64)
        solution = torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64))
        return float(solution.solution[0])

    groups = torch.arange(len(features)) % GROUPS
    without = [distance(features[groups != group]) for group in range(GROUPS)]
    return from_jackknife(distance(features), without)


def _quick_distance(first: Gaussian, second: Gaussian) -> float:
    """`frechet_distance` for a spread, in less than half of its time.

    The eigenvalues of F₂ᵀΣ₁F₂ are the squares of the singular values of F₁ᵀF₂. Rounding leaves those
    that should be zero at 1e-16 of the largest, and their roots add the same 1e-8 to every term.
    """
    difference = first.mean - second.mean
    product = second.factor.T @ first.covariance @ second.factor
    overlap = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return float(difference @ difference + traces - 2 * overlap)


def _moments_by_group(features: Tensor, groups: int) -> Sequence[Moments]:
    """Every `groups`-th vector belongs to one group, so that sets sorted by class split evenly."""
    require_finite(features)
    origin = features.mean(dim=0, dtype=torch.float64)
    moments = [Moments(origin) for _ in range(groups)]
    for group, sums in enumerate(moments):
        sums.add(features[group::groups])
    return moments


def require_finite(features: Float[Tensor, "M D"]) -> None:
    """Refuse features that are not numbers, which would make every metric NaN without a word."""
    # A sum is finite when all terms are; huge finite terms are not features.
    if not torch.isfinite(features.sum(dim=1, dtype=torch.float64)).all():
        bad = int((~torch.isfinite(features).all(dim=1)).sum())
        raise UserError(f"the features of {bad} of {len(features)} images are NaN or infinite")

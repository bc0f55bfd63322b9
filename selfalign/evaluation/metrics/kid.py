"""KID: like FID, but unbiased."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from selfalign.errors import UserError
from selfalign.evaluation.estimate import Estimate, from_independent
from selfalign.evaluation.metrics import (
    INCEPTION,
    LOWER,
    REFERENCE_IMAGES,
    Evidence,
    Finding,
    Metric,
    at_least,
    at_least_reference,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    Subset = tuple[Int[Tensor, "S"], Int[Tensor, "S"]]
    """Numbers of samples and of reference images."""

SUBSETS = 100
SUBSET_SIZE = 1000


class KID(Metric):
    """The kernel distance of Inception's `pool_3` (arXiv:1801.01401)."""

    name = "kid"
    values: ClassVar = {"kid": LOWER}
    needs = (INCEPTION, REFERENCE_IMAGES, at_least(SUBSET_SIZE), at_least_reference(SUBSET_SIZE))

    def measure(self, evidence: Evidence) -> Finding:
        """See `kernel_distance`."""
        samples, reference = evidence.features["features"], evidence.reference.features
        assert reference is not None
        subsets = draw_subsets(len(samples), len(reference))
        return Finding({"kid": kernel_distance(samples, reference, subsets)})


def draw_subsets(samples: int, reference: int, seed: int = 0) -> list[Subset]:
    """KID's random subsets, each without repetition.

    Raises:
        UserError: fewer images than a subset holds.
    """
    import torch

    from selfalign.randomness import make_generator

    for name, count in (("samples", samples), ("reference images", reference)):
        if count < SUBSET_SIZE:
            raise UserError(f"kid needs at least {SUBSET_SIZE} {name}, here are {count}")
    subsets = []
    for k in range(SUBSETS):
        generator = make_generator(seed, "kid subset", k)
        first, second = (
            torch.randperm(count, generator=generator)[:SUBSET_SIZE]
            for count in (samples, reference)
        )
        subsets.append((first, second))
    return subsets


def kernel_distance(
    samples: Float[Tensor, "M D"], reference: Float[Tensor, "R D"], subsets: Iterable[Subset]
) -> Estimate:
    """KID: the unbiased squared MMD with the kernel (x·y/D + 1)³, mean over subsets (1801.01401).

    The standard error counts only as many subsets as fit into the samples side by side.
    """
    from selfalign.evaluation.frechet import require_finite

    require_finite(samples)
    require_finite(reference)
    values = [_squared_mmd(samples[i].double(), reference[j].double()) for i, j in subsets]
    fitting = min(len(samples), len(reference)) // SUBSET_SIZE
    return from_independent(values, min(len(values), max(1, fitting)))


def _squared_mmd(first: Float[Tensor, "S D"], second: Float[Tensor, "S D"]) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(a: Tensor) -> Tensor:
        products = kernel(a, a)
        return (products.sum() - products.trace()) / (len(a) * (len(a) - 1))

    across = kernel(first, second).mean()
    return (mean_of_pairs(first) + mean_of_pairs(second) - 2 * across).item()

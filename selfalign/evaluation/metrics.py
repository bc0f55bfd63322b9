"""Inception Score, KID, class consistency and the memorisation check."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.errors import UserError
from selfalign.evaluation.estimate import GROUPS, Estimate, from_independent, from_share
from selfalign.evaluation.frechet import require_finite
from selfalign.randomness import make_generator

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
MEMORISED_QUANTILE = 0.05
"""A sample counts as near a training image when it is nearer than all but this share of held-out ones."""

Subset = tuple[Int[Tensor, "S"], Int[Tensor, "S"]]
"""Numbers of samples and of reference images."""


def inception_score(logits: Float[Tensor, "M K"], splits: int = GROUPS) -> Estimate:
    """exp of the mean KL(p(y|x) ‖ p(y)) within sequential splits; mean over them (arXiv:1606.03498).

    Args:
        logits: in the order of the samples, computed without bias as in the ADM suite.
        splits: ten splits of 50,000 samples are ADM's splits of 5,000.

    Raises:
        UserError: fewer samples than splits, or NaN among the logits.
    """
    count = len(logits)
    if count < splits:
        raise UserError(f"the Inception Score needs at least {splits} samples, here are {count}")
    require_finite(logits)
    scores = []
    for k in range(splits):
        part = logits[k * count // splits : (k + 1) * count // splits].double()
        log_conditional = part.log_softmax(dim=1)
        conditional = log_conditional.exp()
        # In logarithms, so that a class no sample has costs nothing and makes no NaN.
        log_marginal = log_conditional.logsumexp(dim=0) - torch.tensor(len(part)).double().log()
        divergence = (conditional * (log_conditional - log_marginal)).sum(dim=1).mean()
        scores.append(divergence.exp().item())
    return from_independent(scores)


def draw_subsets(samples: int, reference: int, seed: int = 0) -> list[Subset]:
    """KID's random subsets, each without repetition.

    Raises:
        UserError: fewer images than a subset holds.
    """
    for name, count in (("samples", samples), ("reference images", reference)):
        if count < KID_SUBSET_SIZE:
            raise UserError(f"kid needs at least {KID_SUBSET_SIZE} {name}, here are {count}")
    subsets = []
    for k in range(KID_SUBSETS):
        generator = make_generator(seed, "kid subset", k)
        first, second = (
            torch.randperm(count, generator=generator)[:KID_SUBSET_SIZE]
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
    require_finite(samples)
    require_finite(reference)
    values = [_squared_mmd(samples[i].double(), reference[j].double()) for i, j in subsets]
    fitting = min(len(samples), len(reference)) // KID_SUBSET_SIZE
    return from_independent(values, min(len(values), max(1, fitting)))


def _squared_mmd(first: Float[Tensor, "S D"], second: Float[Tensor, "S D"]) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(a: Tensor) -> Tensor:
        products = kernel(a, a)
        return (products.sum() - products.trace()) / (len(a) * (len(a) - 1))

    across = kernel(first, second).mean()
    return (mean_of_pairs(first) + mean_of_pairs(second) - 2 * across).item()


def class_consistency(logits: Float[Tensor, "M K"], labels: Int[Tensor, "M"]) -> Estimate:
    """Share of conditional samples that a classifier recognises as their class."""
    return from_share((logits.argmax(dim=1) == labels).double().mean().item(), len(labels))


def memorisation(
    samples: Float[Tensor, "M"], heldout: Float[Tensor, "H"]
) -> tuple[Estimate, Estimate]:
    """How near samples come to training images, measured by how near held-out images come.

    Args:
        samples: distance of every sample to its nearest training image.
        heldout: the same of held-out images.

    Returns:
        The share of samples nearer than all but 5 % of the held-out images (0.05 for fresh data), and
        the chance that a sample is nearer than a held-out image (0.5 for fresh data; ties count half).
    """
    threshold = torch.quantile(heldout.double(), MEMORISED_QUANTILE)
    near = (samples < threshold).double().mean().item()
    ordered = heldout.sort().values
    above = len(heldout) - torch.searchsorted(ordered, samples, right=True)
    not_below = len(heldout) - torch.searchsorted(ordered, samples, right=False)
    ranks = (above + not_below).double() / (2 * len(heldout))
    spread = ranks.std().item() if len(samples) > 1 else 0.0
    return (
        from_share(near, len(samples)),
        Estimate(ranks.mean().item(), spread / len(samples) ** 0.5),
    )

"""The Inception Score."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, ClassVar

from selfalign.errors import UserError
from selfalign.evaluation.estimate import GROUPS, Estimate, from_independent, from_jackknife
from selfalign.evaluation.metrics import (
    HIGHER,
    INCEPTION,
    Available,
    Evidence,
    Finding,
    Metric,
    Need,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LEAST = 2 * GROUPS
"""Samples that one split needs: of a single one the score is always 1."""


def _missing(available: Available) -> str | None:
    needed = max(LEAST, 2 * available.inception_splits)
    if available.samples >= needed:
        return None
    return (
        f"at least {needed} samples with --inception-splits {available.inception_splits}, here are "
        f"{available.samples}"
    )


class InceptionScore(Metric):
    """How sure Inception is of every sample, and how varied its classes are (arXiv:1606.03498)."""

    name = "is"
    values: ClassVar = {"inception_score": HIGHER}
    needs = (INCEPTION, Need(_missing, noted=True))
    reads = frozenset({"logits"})

    def measure(self, evidence: Evidence) -> Finding:
        """See `inception_score`."""
        splits = evidence.setup.config.inception_splits
        return Finding({"inception_score": inception_score(evidence.features["logits"], splits)})


def inception_score(logits: Float[Tensor, "M K"], splits: int = GROUPS) -> Estimate:
    """exp of the mean KL(p(y|x) ‖ p(y)) within sequential splits; mean over them (arXiv:1606.03498).

    A single split has no spread: its standard error is a delete-a-group jackknife's.

    Args:
        logits: in the order of the samples, computed without bias as in the ADM suite.
        splits: ten splits of 50,000 samples are ADM's splits of 5,000.

    Raises:
        UserError: fewer than two samples in a split or twenty in all, or NaN among the logits.
    """
    from selfalign.evaluation.frechet import require_finite

    count, needed = len(logits), max(LEAST, 2 * splits)
    if count < needed:
        raise UserError(
            f"the Inception Score in {splits} splits needs at least {needed} samples, here are {count}"
        )
    require_finite(logits)
    if splits == 1:
        kept = [[i for i in range(count) if i % GROUPS != group] for group in range(GROUPS)]
        return from_jackknife(_score(logits), [_score(logits[part]) for part in kept])
    bounds = [k * count // splits for k in range(splits + 1)]
    scores = [_score(logits[i:j]) for i, j in itertools.pairwise(bounds)]
    return from_independent(scores)


def _score(logits: Float[Tensor, "S K"]) -> float:
    log_conditional = logits.double().log_softmax(dim=1)
    # In logarithms, so that a class no sample has costs nothing and makes no NaN.
    log_marginal = log_conditional.logsumexp(dim=0) - math.log(len(logits))
    divergence = (log_conditional.exp() * (log_conditional - log_marginal)).sum(dim=1).mean()
    return divergence.exp().item()

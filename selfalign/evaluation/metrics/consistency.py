"""Class consistency: whether conditional samples look like their class."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from selfalign.evaluation.estimate import Estimate, from_share
from selfalign.evaluation.metrics import HIGHER_SHARE, Available, Evidence, Finding, Metric, Need

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def _missing(available: Available) -> str | None:
    if available.network == "classifier" and available.labels is not None:
        return None
    return "--features classifier, and samples with labels (arr_1)"


def _outside(available: Available) -> str | None:
    """No classifier recognises a class that it does not know: the share would be 0 for that alone."""
    smallest, largest = available.labels or (0, 0)
    if smallest >= 0 and largest < available.classes:
        return None
    return (
        f"labels of the classifier's classes, 0 to {available.classes - 1}: here are labels from "
        f"{smallest} to {largest}"
    )


class ClassConsistency(Metric):
    """The share of conditional samples that the data's own classifier recognises as their class."""

    name = "consistency"
    values: ClassVar = {"class_consistency": HIGHER_SHARE}
    needs = (Need(_missing), Need(_outside, noted=True))
    reads = frozenset({"logits"})

    def measure(self, evidence: Evidence) -> Finding:
        """See `class_consistency`."""
        labels = evidence.samples.labels
        assert labels is not None
        return Finding(
            {"class_consistency": class_consistency(evidence.features["logits"], labels)}
        )


def class_consistency(logits: Float[Tensor, "M K"], labels: Int[Tensor, M]) -> Estimate:
    """Share of samples whose largest logit is that of their label."""
    return from_share((logits.argmax(dim=1) == labels).double().mean().item(), len(labels))

"""Improved precision and recall: fidelity and coverage."""

from typing import ClassVar

from selfalign.evaluation.metrics import (
    HIGHER_SHARE,
    REFERENCE_IMAGES,
    Available,
    Evidence,
    Finding,
    Metric,
    Need,
    at_least_reference,
)

NEIGHBOURS = 3
"""k of the improved precision and recall (arXiv:1904.06991), as in the ADM suite."""


def _missing(available: Available) -> str | None:
    if available.samples > NEIGHBOURS:
        return None
    return f"more than {NEIGHBOURS} samples, here are {available.samples}"


class PrecisionRecall(Metric):
    """Shares of samples near reference images, and of reference images near samples."""

    name = "precision-recall"
    values: ClassVar = {"precision": HIGHER_SHARE, "recall": HIGHER_SHARE}
    needs = (REFERENCE_IMAGES, Need(_missing, noted=True), at_least_reference(NEIGHBOURS + 1))
    of_heldout = True

    def measure(self, evidence: Evidence) -> Finding:
        """See `neighbours.precision_recall`."""
        from selfalign.evaluation.neighbours import precision_recall

        reference = evidence.reference.features
        assert reference is not None
        precision, recall = precision_recall(evidence.features["features"], reference, NEIGHBOURS)
        return Finding({"precision": precision, "recall": recall})

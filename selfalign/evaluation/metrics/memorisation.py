"""Memorisation: whether samples are copies of training images.

Distances are of pixels, where no network blurs what a copy is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from selfalign.evaluation.estimate import Estimate, from_share
from selfalign.evaluation.metrics import Aim, Available, Evidence, Finding, Metric, Need, at_least

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.evaluation.inputs import ImageSet

NEAR = 0.05
"""A sample counts as near a training image when it is nearer than all but this share of held-out ones."""
LEAST_HELDOUT = round(1 / NEAR)
"""Held-out images of which that share is at least one."""
MOST_HELDOUT = 10_000
PART = 4096
"""Images read at once."""


def _missing(available: Available) -> str | None:
    if available.heldout_images:
        return None
    return "a data set as --reference, for its held-out images"


def _few(available: Available) -> str | None:
    if available.heldout_images >= LEAST_HELDOUT:
        return None
    return f"at least {LEAST_HELDOUT} held-out images, here are {available.heldout_images}"


class Memorisation(Metric):
    """How near samples come to training images, measured by how near held-out images come."""

    name = "memorisation"
    values: ClassVar = {
        "memorised_share": Aim(f"{NEAR}", share=True),
        "nearer_than_heldout": Aim("0.5", share=True),
    }
    needs = (Need(_missing), Need(_few, noted=True), at_least(2))
    reads = frozenset()

    def on_request(self, available: Available) -> bool:
        """The pixels of a large data set take long to compare."""
        return available.network != "classifier"

    def measure(self, evidence: Evidence) -> Finding:
        """Distances to the nearest training images, and for the picture the nearest of all samples."""
        import torch

        from selfalign.evaluation.neighbours import nearest
        from selfalign.evaluation.report import SHOWN, NeighbourRow

        samples, train = evidence.samples, evidence.reference.images
        heldout = evidence.setup.reference.heldout
        assert heldout is not None and train is not None
        fresh = heldout.first(min(len(heldout), MOST_HELDOUT))
        queries = torch.cat([*_pixels(samples), *_pixels(fresh)])
        distances, indices = nearest(queries, _pixels(train))
        share, chance = memorisation(distances[: len(samples)], distances[len(samples) :])
        shown = (
            ("first samples", torch.arange(min(SHOWN, len(samples)))),
            (
                "samples nearest to a training image",
                distances[: len(samples)].argsort()[:SHOWN],
            ),
        )
        rows = [
            NeighbourRow(title, samples.read(chosen.tolist()), train.read(indices[chosen].tolist()))
            for title, chosen in shown
        ]
        return Finding({"memorised_share": share, "nearer_than_heldout": chance}, rows)


def _pixels(images: ImageSet) -> Iterator[Float[Tensor, "B P"]]:
    for first in range(0, len(images), PART):
        part = images.read(range(first, min(first + PART, len(images))))
        yield part.flatten(1).float() / 255


def memorisation(samples: Float[Tensor, M], heldout: Float[Tensor, H]) -> tuple[Estimate, Estimate]:
    """How near samples come to training images, from distances to the nearest one.

    Args:
        samples: distance of every sample to its nearest training image.
        heldout: the same of held-out images.

    Returns:
        The share of samples nearer than all but 5 % of the held-out images (0.05 for fresh data), and
        the chance that a sample is nearer than a held-out image (0.5 for fresh data; ties count half).
    """
    import torch

    threshold = torch.quantile(heldout.double(), NEAR)
    near = (samples < threshold).double().mean().item()
    ordered = heldout.sort().values
    above = len(heldout) - torch.searchsorted(ordered, samples, right=True)
    not_below = len(heldout) - torch.searchsorted(ordered, samples, right=False)
    ranks = (above + not_below).double() / (2 * len(heldout))
    return (
        from_share(near, len(samples)),
        Estimate(ranks.mean().item(), ranks.std().item() / len(samples) ** 0.5),
    )

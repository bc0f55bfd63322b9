"""Memorisation: whether samples are copies of training images.

A copy is much nearer to one training image than to any other (arXiv:2310.02664): what counts is the ratio
of the distances to the nearest and to the second nearest. The nearest distance alone is small for every
sample of a dense region. Distances are of pixels, where no network blurs what a copy is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from selfalign.evaluation.estimate import Estimate, from_share
from selfalign.evaluation.metrics import Aim, Available, Evidence, Finding, Metric, Need, at_least

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.evaluation.inputs import ImageSet

NEAR = 0.05
"""A sample counts as a copy when its ratio is below that of all but this share of held-out images."""
PLANTED = 500
"""Training images that are planted as copies, to see whether they are found."""
PLANTED_NOISE = 0.05
"""Standard deviation of what sets a planted copy apart from its image, in units of the pixels' range."""
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
    """How much nearer samples are to one training image than to any other, set against held-out images."""

    name = "memorisation"
    values: ClassVar = {
        "memorised_share": Aim(f"{NEAR}", share=True),
        "nearer_than_heldout": Aim("0.5", share=True),
        "planted_copies_found": Aim("1", share=True),
    }
    needs = (Need(_missing), Need(_few, noted=True), at_least(2))
    reads = frozenset()

    def on_request(self, available: Available) -> bool:
        """The pixels of a large data set take long to compare."""
        return available.network != "classifier"

    def measure(self, evidence: Evidence) -> Finding:
        """Ratios of distances to training images, and for the picture the nearest of all samples."""
        import torch

        from selfalign.evaluation.neighbours import several_nearest
        from selfalign.evaluation.report import SHOWN, NeighbourRow

        samples, train = evidence.samples, _trained_on(evidence)
        heldout = evidence.setup.reference.heldout
        assert heldout is not None
        fresh = heldout.first(min(len(heldout), MOST_HELDOUT))
        sets = [torch.cat(list(_pixels(images))) for images in (samples, fresh)]
        sets.append(_planted(train))
        both, indices = several_nearest(torch.cat(sets), _pixels(train), 2)
        # Two equal training images are both at distance 0 from their copy.
        ratios = both[:, 0] / both[:, 1].clamp(min=torch.finfo(both.dtype).tiny)
        of_samples, of_heldout, of_planted = ratios.split([len(images) for images in sets])
        share, chance = memorisation(of_samples, of_heldout)
        found, _ = memorisation(of_planted, of_heldout)
        indices = indices[:, 0]
        shown = (
            ("first samples", torch.arange(min(SHOWN, len(samples)))),
            (
                "samples nearest to a training image",
                both[: len(samples), 0].argsort()[:SHOWN],
            ),
        )
        rows = [
            NeighbourRow(title, samples.read(chosen.tolist()), train.read(indices[chosen].tolist()))
            for title, chosen in shown
        ]
        return Finding(
            {
                "memorised_share": share,
                "nearer_than_heldout": chance,
                "planted_copies_found": found,
            },
            rows,
        )


def _trained_on(evidence: Evidence) -> ImageSet:
    """The images that a run was trained on, where it is one on a share of the reference's."""
    from selfalign.data.datasets import open_data
    from selfalign.evaluation.inputs import open_split

    images, run, data = evidence.reference.images, evidence.setup.run, evidence.setup.data
    assert images is not None
    if run is None or data is None or run.config.data.train_fraction == 1:
        return images
    own = dataclasses.replace(data, train_fraction=run.config.data.train_fraction)
    return open_split(data.name, open_data(own), "training")


def _planted(train: ImageSet) -> Float[Tensor, "M P"]:
    """Copies of training images that are not quite exact: the positive control."""
    import torch

    from selfalign.randomness import make_generator

    generator = make_generator(0, "planted copies")
    chosen = torch.randperm(len(train), generator=generator)[:PLANTED]
    pixels = train.read(chosen.tolist()).flatten(1).float() / 255
    return pixels + PLANTED_NOISE * torch.randn(pixels.shape, generator=generator)


def _pixels(images: ImageSet) -> Iterator[Float[Tensor, "B P"]]:
    for first in range(0, len(images), PART):
        part = images.read(range(first, min(first + PART, len(images))))
        yield part.flatten(1).float() / 255


def memorisation(samples: Float[Tensor, M], heldout: Float[Tensor, H]) -> tuple[Estimate, Estimate]:
    """How like copies samples are, from ratios of the distances to the two nearest training images.

    Args:
        samples: distance of every sample to its nearest training image, over that to the second nearest.
        heldout: the same of held-out images.

    Returns:
        The share of samples whose ratio is below that of all but 5 % of the held-out images (0.05 for fresh
        data), and the chance that a sample's is below a held-out image's (0.5 for fresh data; ties count
        half).
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

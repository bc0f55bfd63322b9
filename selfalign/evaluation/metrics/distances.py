"""Fréchet distances of Gaussian fits: FID, sFID, and those of other features, never called FID."""

import dataclasses
import math
from typing import ClassVar

from selfalign.evaluation.estimate import GROUPS, Estimate
from selfalign.evaluation.metrics import (
    INCEPTION,
    LOWER,
    Available,
    Evidence,
    Finding,
    Metric,
    Need,
    at_least,
    at_least_reference,
)

CLASSIFIERS = 4
"""Two of each half of the training images."""
LEAST_EXTRAPOLATED = 320
"""Samples whose quarters outnumber a classifier's features. The digits have 400 held-out images."""


def _statistics(kind: str, names: str) -> Need:
    """A reference with the Gaussian fit of a kind of features, by its names in ADM's files."""

    def missing(available: Available) -> str | None:
        if kind in available.statistics:
            return None
        return f"a reference with images, or with {names}"

    return Need(missing)


class FID(Metric):
    """The Fréchet distance of Inception's `pool_3` (arXiv:1706.08500)."""

    name = "fid"
    values: ClassVar = {"fid": LOWER}
    needs = (INCEPTION, _statistics("features", "mu and sigma"), at_least(2 * GROUPS))
    of_heldout = True
    kind: ClassVar[str] = "features"

    def measure(self, evidence: Evidence) -> Finding:
        """See `frechet_estimate`."""
        from selfalign.evaluation.frechet import frechet_estimate

        estimate = frechet_estimate(
            evidence.features[self.kind], evidence.reference.gaussians[self.kind]
        )
        (value,) = self.values
        return Finding({value.format(network=evidence.setup.network.name): estimate})


class SFID(FID):
    """The same of 2,023 spatial features: layout (arXiv:2103.03841)."""

    name = "sfid"
    values: ClassVar = {"sfid": LOWER}
    needs = (INCEPTION, _statistics("spatial", "mu_s and sigma_s"), at_least(2 * GROUPS))
    reads = frozenset({"spatial"})
    kind = "spatial"


class FrechetDistance(FID):
    """The Fréchet distance of other features than Inception's."""

    name = "fd"
    values: ClassVar = {"fd_{network}": LOWER}
    needs = (
        Need(lambda a: "other --features than inception" if a.network == "inception" else None),
        *FID.needs[1:],
    )


class UnbiasedDistance(Metric):
    """The Fréchet distance on features of the data set's own classifiers, without their usual biases.

    The number of images is extrapolated to infinity; classifier and reference are of different halves of
    the training images, each half in turn; and the mean is over several classifiers.
    """

    name = "fd-infinity"
    values: ClassVar = {"fd_infinity": LOWER}
    needs = (
        Need(lambda a: None if a.network == "classifier" else "--features classifier"),
        Need(lambda a: None if a.heldout_images else "a data set as --reference"),
        at_least(LEAST_EXTRAPOLATED),
        at_least_reference(8 * GROUPS),
    )
    reads = frozenset()
    of_heldout = True

    def on_request(self, available: Available) -> bool:
        """Several classifiers are trained for it."""
        return True

    def measure(self, evidence: Evidence) -> Finding:
        """See `extrapolated_distance`."""
        from selfalign.evaluation.classifier import get_classifier, halves
        from selfalign.evaluation.features import FeatureNetwork
        from selfalign.evaluation.frechet import extrapolated_distance
        from selfalign.evaluation.reference import ReferenceSource, measure

        setup = evidence.setup
        source, images, data = setup.source, evidence.reference.images, setup.data
        assert source is not None and images is not None and data is not None
        found = []
        for number in range(CLASSIFIERS):
            half = number % 2
            module = get_classifier(source, data.name, number // 2, half).module
            own = dataclasses.replace(setup, network=FeatureNetwork("classifier", module))
            others = images.choose(halves(len(images))[1 - half].tolist(), f"half {1 - half}")
            reference = measure(
                ReferenceSource(others.name, others.fingerprint, others),
                own.network,
                own.parts,
                setup.accelerator,
            )
            features = own.features(evidence.samples, frozenset({"features"}))["features"]
            assert reference.features is not None
            found.append(extrapolated_distance(features, reference.features))
        # The samples are the same for all classifiers, so their errors do not average out.
        error = math.fsum(estimate.standard_error for estimate in found) / len(found)
        mean = math.fsum(estimate.value for estimate in found) / len(found)
        return Finding({"fd_infinity": Estimate(mean, error)})

"""Fréchet distances of Gaussian fits: FID, sFID, and those of other features, never called FID."""

from typing import ClassVar

from selfalign.evaluation.estimate import GROUPS
from selfalign.evaluation.metrics import (
    INCEPTION,
    LOWER,
    Available,
    Evidence,
    Finding,
    Metric,
    Need,
    at_least,
)


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

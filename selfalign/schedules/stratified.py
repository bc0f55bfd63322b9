"""Stratified timesteps: a batch covers p(t) evenly, and no two samples share a stratum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.schedules.independent import Independent
from selfalign.schedules.single import Single

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.schedules import Distribution


def stratify(distribution: Distribution) -> Float[Tensor, B]:
    """One timestep from each of B parts of p(t) of equal mass: the quantiles of (π(b) + u_b)/B.

    Each sample's own timestep still follows p(t). The permutation π is the order of an ordinary draw, so
    that a run sees about the timesteps that it would see without strata. Under several processes, or
    micro-batches, each has strata of its own.
    """
    ranks = distribution().argsort().argsort()
    return distribution.quantile((ranks + distribution.uniform()) / len(ranks))


@register("stratified")
@dataclass(frozen=True)
class Stratified(Single):
    """As `single`, with timesteps that are stratified over the batch."""

    def timesteps(
        self, earlier: Sequence[Float[Tensor, B]], distribution: Distribution
    ) -> Float[Tensor, B]:
        """The first group's for all."""
        return earlier[0] if earlier else stratify(distribution)


@register("stratified-independent")
@dataclass(frozen=True)
class StratifiedIndependent(Independent):
    """As `independent`, with each group's timesteps stratified over the batch."""

    def timesteps(
        self, earlier: Sequence[Float[Tensor, B]], distribution: Distribution
    ) -> Float[Tensor, B]:
        """A fresh draw, with strata in an order of their own."""
        return stratify(distribution)

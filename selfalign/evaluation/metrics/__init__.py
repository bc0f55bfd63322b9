"""Metrics: one file each (or one file for close kin), found by listing this package.

A metric is a class that says its name, what it needs, what it reads, what its values aim at and how they
are computed. Everything else follows from these: `--metrics`, which metrics are possible, which are left
out and why, what is measured of held-out images too, the table and the picture. The files import torch
within their functions, so that `selfalign evaluate --help` can list them without it.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from selfalign.errors import UserError
from selfalign.evaluation.estimate import Estimate

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.evaluation.inputs import ImageSet
    from selfalign.evaluation.reference import Reference
    from selfalign.evaluation.report import NeighbourRow
    from selfalign.evaluation.setup import Setup
    from selfalign.training.heldout import HeldOutLoss


@dataclass(frozen=True)
class Aim:
    """What a perfect model reaches."""

    best: str
    """`higher`, `lower`, or the value itself."""
    share: bool = False
    """Whether values lie between 0 and 1."""


HIGHER, LOWER = Aim("higher"), Aim("lower")
HIGHER_SHARE = Aim("higher", share=True)


@dataclass(frozen=True)
class Available:
    """What an evaluation can measure with; all of it is known before anything is sampled or computed."""

    network: str
    """Name of the feature network."""
    features: frozenset[str]
    """Kinds of features that the network gives: `features`, perhaps `logits` and `spatial`."""
    samples: int
    """How many there are, or will be."""
    labels: tuple[int, int] | None
    """Smallest and largest label of the samples; None without labels."""
    classes: int
    """Classes of the data set that a classifier is trained on; 0 without."""
    statistics: frozenset[str]
    """Kinds of features whose Gaussian fit the reference has."""
    reference_images: int
    """Reference images whose features are compared one by one; 0 where there are statistics only."""
    heldout_images: int
    """Held-out images; 0 where the reference is no data set."""
    run: bool
    """Whether the samples are a run's."""
    run_data: str | None
    """Why the data set in play is not one that the run could be tried on; None where it is."""
    inception_splits: int
    """Splits of the Inception Score."""


@dataclass(frozen=True)
class Need:
    """One thing that a metric cannot do without."""

    missing: Callable[[Available], str | None]
    """What is missing, as it completes `needs …`; None where it is there."""
    noted: bool = False
    """Whether a metric that is left out for it is worth a note, because its kind of input is there."""


@dataclass(frozen=True)
class Evidence:
    """What metrics are computed from."""

    setup: Setup
    samples: ImageSet
    features: Mapping[str, Float[Tensor, "M F"]]
    """Of the samples: the kinds that the chosen metrics read."""
    reference: Reference


@dataclass(frozen=True)
class Finding:
    """What a metric found."""

    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    rows: Sequence[NeighbourRow] = ()
    """For the picture: samples and their nearest training images."""
    losses: Mapping[str, HeldOutLoss] = field(default_factory=dict)
    """By weights, ema and raw."""


class Metric(ABC):
    """One metric. Subclasses register themselves under their name."""

    name: ClassVar[str] = ""
    """What `--metrics` calls it."""
    values: ClassVar[Mapping[str, Aim]]
    """Its values in the report, and what each aims at; `{network}` stands for the feature network."""
    needs: ClassVar[tuple[Need, ...]]
    reads: ClassVar[frozenset[str]] = frozenset({"features"})
    """Kinds of features of the samples that it reads."""
    of_heldout: ClassVar[bool] = False
    """Whether it is measured of held-out images too: what a perfect model reaches."""

    def __init_subclass__(cls) -> None:
        if cls.name:
            _registered[cls.name] = cls()

    def lacks(self, available: Available) -> Need | None:
        """The first of its needs that is not met."""
        return next((need for need in self.needs if need.missing(available)), None)

    def on_request(self, available: Available) -> bool:
        """Whether it is measured only where `--metrics` names it."""
        return False

    @abstractmethod
    def measure(self, evidence: Evidence) -> Finding:
        """Compute it.

        Raises:
            UserError: features that are NaN or infinite.
        """


_registered: dict[str, Metric] = {}


def metrics() -> Mapping[str, Metric]:
    """All metrics, by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_registered.items()))


def aims(network: str) -> dict[str, Aim]:
    """What every value of the report aims at, for features of a network."""
    return {
        value.format(network=network): aim
        for metric in metrics().values()
        for value, aim in metric.values.items()
    }


def choose(wanted: Sequence[str], available: Available) -> tuple[list[Metric], list[str]]:
    """The metrics asked for, or all that inputs and features allow.

    Args:
        wanted: names; none stands for all that are possible.
        available: what there is.

    Returns:
        The metrics, and notes on those that are left out though their kind of input is there.

    Raises:
        UserError: one that was asked for is not possible, or none is.
    """
    known = metrics()
    lacking = {name: metric.lacks(available) for name, metric in known.items()}
    possible = [name for name, need in lacking.items() if need is None]
    for name in wanted:
        if (need := lacking[name]) is not None:
            raise UserError(
                f"--metrics {name} needs {need.missing(available)}; possible here are "
                f"{', '.join(possible) or 'none'}"
            )
    if wanted:
        return [known[name] for name in dict.fromkeys(wanted)], []
    chosen = [known[name] for name in possible if not known[name].on_request(available)]
    notes = [
        f"{name} is left out: it needs {need.missing(available)}"
        for name, need in lacking.items()
        if need is not None and need.noted and not known[name].on_request(available)
    ]
    if not chosen:
        raise UserError(f"there is nothing to measure: {'; '.join(notes) or 'no metric applies'}")
    return chosen, notes


INCEPTION = Need(lambda a: None if a.network == "inception" else "--features inception")
REFERENCE_IMAGES = Need(lambda a: None if a.reference_images else "a reference with images")


def at_least(count: int) -> Need:
    """So many samples."""
    return Need(
        lambda a: None if a.samples >= count else f"at least {count} samples, here are {a.samples}",
        noted=True,
    )


def at_least_reference(count: int) -> Need:
    """So many reference images."""
    return Need(
        lambda a: (
            None
            if a.reference_images >= count
            else f"at least {count} reference images, here are {a.reference_images}"
        ),
        noted=True,
    )

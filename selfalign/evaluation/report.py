"""What an evaluation says."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from selfalign.evaluation.estimate import Estimate
from selfalign.evaluation.metrics import LOWER, Aim
from selfalign.training.heldout import HeldOutLoss

SHOWN = 10
"""Samples in a row of the picture."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    folder: Path
    metrics: Mapping[str, Estimate]
    baseline: Mapping[str, Estimate]
    """The same of held-out images, where the reference is a data set: what a perfect model reaches."""
    denoising: Mapping[str, HeldOutLoss]
    """By weights, ema and raw."""
    settings: Mapping[str, Any]
    """Everything the numbers depend on."""
    notes: Sequence[str]
    """What to know before comparing them."""
    aims: Mapping[str, Aim] = field(default_factory=dict)
    """What each metric should reach."""

    def aim(self, metric: str) -> Aim:
        """What a metric should reach."""
        return self.aims.get(metric, LOWER)

    def as_json(self) -> dict[str, Any]:
        """What evaluation.json holds."""
        return {
            "metrics": {name: dataclasses.asdict(e) for name, e in self.metrics.items()},
            "heldout_images": {name: dataclasses.asdict(e) for name, e in self.baseline.items()},
            "heldout_denoising_loss": {
                name: dataclasses.asdict(loss) for name, loss in self.denoising.items()
            },
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }


@dataclass(frozen=True)
class NeighbourRow:
    """Samples, and below each its nearest training image."""

    title: str
    samples: UInt8[Tensor, "M C H W"]
    neighbours: UInt8[Tensor, "M C H W"]

"""The settings of an evaluation. Imports no torch, so that their help is there at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from selfalign.errors import UserError
from selfalign.evaluation.estimate import GROUPS
from selfalign.evaluation.metrics import metrics
from selfalign.sections import MAX_BATCH, MAX_SAMPLES, check_colour

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how much of how much."""

if TYPE_CHECKING:
    MetricName = str
else:
    # The names are those of the metrics' own files, so that none is listed twice.
    MetricName = Literal[tuple(metrics())]


@dataclass(frozen=True)
class EvaluationData:
    """The data set that a classifier is trained on, and that a run's held-out images come from. What
    is left out comes from the run, or else from --reference."""

    name: str | None = None
    """digits, mnist, fashion-mnist, cifar10 or folder."""
    root: str | None = None
    """Folder that holds its files."""
    image_size: int | None = None
    """Side of the square that a folder's images are cropped and resized to."""
    background: str | None = None
    """Colour behind images where they are transparent, those of folders that are compared too; left out:
    that of the run, or else white."""
    skip_unreadable: bool = False
    """Leave out a data set's images that cannot be read."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is compared with what, and how."""

    reference: str | None = None
    """A data set (its training split), a .npz (ADM reference batch or samples) or a folder of images;
    left out: the data set."""
    features: str | None = None
    """inception, dinov2, classifier or timm:NAME; left out: classifier for digits, mnist and
    fashion-mnist, else inception."""
    metrics: tuple[MetricName, ...] = ()
    """Which metrics; left out: all that inputs and features allow."""
    num: int | None = None
    """How many samples (under torchrun: --num-samples); left out: 1000 of a run, all of a file or folder."""
    labels: Literal["random", "balanced"] | tuple[int, ...] = "random"
    """Classes of a run's samples: drawn at random, balanced (sample i has class i modulo their number),
    or given ones, repeated in order."""
    out: Path | None = None
    """Folder for evaluation.json and evaluation.png, and for the samples of a run that cannot be written
    into; left out: beside the samples."""
    weights: str = "ema"
    """Which weights of a run are sampled from: ema, raw, or ema:DECAY of a run that keeps several averages;
    several are evaluated one after the other."""
    step: int | None = None
    """Step of the checkpoint of a run; left out: the last one."""
    batch_size: int = 64
    """Images at once in each process."""
    inception_splits: int = GROUPS
    """Splits of the Inception Score; ADM's are of 5,000 samples each: 10 for 50,000, 2 for 10,000."""
    write_reference: Path | None = None
    """Also write the reference in ADM's format, to this .npz."""
    data: EvaluationData = field(default_factory=EvaluationData)

    def __post_init__(self) -> None:
        if self.data.background is not None:
            check_colour("data.background", self.data.background)
        for name, most in (
            ("num", MAX_SAMPLES),
            ("batch_size", MAX_BATCH),
            ("inception_splits", MAX_SAMPLES),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is {value}: allowed is a number from 1 to {most:,}")
        known = metrics()
        for metric in self.metrics:
            if metric not in known:
                raise UserError(f"--metrics is {metric}: allowed are {', '.join(known)}")
        if self.write_reference is not None and self.write_reference.suffix != ".npz":
            raise UserError(
                f"--write-reference is {str(self.write_reference)!r}: allowed is a name ending in .npz"
            )

"""Settings of a study that the command line shows: how runs are measured, and where they are run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from selfalign.errors import UserError
from selfalign.evaluation.metrics.distances import LEAST_EXTRAPOLATED
from selfalign.sampling.settings import SamplingConfig
from selfalign.sections import MAX_PROCESSES, MAX_SAMPLES

FEATURES = ("inception", "dinov2", "classifier")
FEWEST_SAMPLES = 20
"""Of which a Fréchet distance can be measured."""
MAX_SEEDS = 10_000
MAX_MINUTES = 10**7


@dataclass(frozen=True)
class Measurement:
    """How every run is measured, while it trains and at its end."""

    num: int = 1000
    """Samples for the Fréchet distance and the other metrics of samples."""
    on_the_way: int | None = None
    """Samples for the Fréchet distance while a run trains; left out: as many as at the end; 0: none."""
    features: str | None = None
    """inception, dinov2, classifier or timm:NAME; left out: the data set's classifier where it is
    small, else inception."""
    heldout_pairs: int | None = None
    """Pairs of a held-out image and a timestep for the final losses; left out: training.heldout_samples."""
    own_samples: bool = False
    """Whether each seed of the study has noise and labels of its own for its samples, so that the spread
    over seeds holds that of sampling; else all runs share them."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(solver="heun"))
    """How samples are made: the same noise and labels for all variants."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num", self.num, FEWEST_SAMPLES),
            ("on_the_way", self.on_the_way or None, FEWEST_SAMPLES),
            ("heldout_pairs", self.heldout_pairs, 10),
        ):
            if value is not None and not least <= value <= MAX_SAMPLES:
                zero = "0 and " * (name == "on_the_way")
                raise UserError(
                    f"measurement.{name} is {value}: allowed is {zero}a number from {least} to "
                    f"{MAX_SAMPLES:,}"
                )
        named = self.features is None or self.features.startswith("timm:")
        if not named and self.features not in FEATURES:
            raise UserError(
                f"measurement.features is {self.features!r}: allowed are {', '.join(FEATURES)} and "
                "timm:NAME"
            )

    def distance(self, small: bool, num: int | None = None) -> str:
        """Name of the Fréchet distance that runs are measured by.

        Args:
            small: whether the data set is one whose classifier gives the features where none are named.
            num: of how many samples; None for those of the end.
        """
        name = self.features or ("classifier" if small else "inception")
        if name == "inception":
            return "fid"
        enough = (self.num if num is None else num) >= LEAST_EXTRAPOLATED
        return "fd_infinity" if name == "classifier" and enough else f"fd_{name}"


@dataclass(frozen=True)
class LaunchConfig:
    """Where runs are run, and how many at once."""

    launcher: Literal["local", "slurm", "submitit-local"] = "local"
    """Processes of this machine, jobs of a SLURM cluster, or submitit's stand-in for a cluster."""
    processes: int | None = None
    """Runs at once on this machine; left out: one per GPU, else cores / threads."""
    threads: int = 1
    """CPU threads of each run."""
    partition: str | None = None
    """SLURM partition."""
    gpus: int = 1
    """GPUs of each SLURM job."""
    minutes: int = 24 * 60
    """Time limit of each SLURM job; one that meets it is queued again and goes on."""
    reuse: tuple[Path, ...] = ()
    """Folders of other studies, whose finished runs are taken over where settings and measurement are the
    same."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("processes", 1, MAX_PROCESSES),
            ("threads", 1, MAX_PROCESSES),
            ("gpus", 0, MAX_PROCESSES),
            ("minutes", 1, MAX_MINUTES),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UserError(
                    f"--{name} is {value}: allowed is a number from {least} to {most:,}"
                )

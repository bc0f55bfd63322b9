"""What the runs of a study measured, as its statistics and its report read it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfalign.arrays import Npz
from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.names import printable
from selfalign.records import read_bytes, read_plain
from selfalign.study.estimates import Array, PairErrors
from selfalign.study.parsing import checked, require_measurable
from selfalign.study.plan import STUDY_FILE, Job, Study, read_study

ERRORS_FILE = "heldout_errors.npz"
"""In a run's folder: by metric the squared error of every held-out pair, and its image and bin of t."""
RESULT_FILE = "result.json"
FAILED_SUFFIX = ".failed"
MAX_BINS = 1000
"""Of t, in which held-out errors can lie."""
MAX_RATIO = 10
"""Of the bytes of a file of errors, packed by somebody else, to those that it has."""
MAX_MESSAGE = 10**6
"""Bytes of the line that says why a run has no result."""
BEST = "heldout_best"
"""The metric that is told by a run's curve."""
RUNS = "runs"
"""Folder of the runs, in the study's."""


@dataclass(frozen=True)
class Metric:
    """A number by which variants are compared."""

    title: str
    better: Literal["lower", "higher", ""]
    """Empty where neither is: it describes."""
    explanation: str


METRICS: dict[str, Metric] = {
    "heldout_loss": Metric(
        "held-out denoising loss",
        "lower",
        "mean squared velocity error of the EMA weights on held-out images, the same images, "
        "timesteps and noise for every run",
    ),
    "fd_infinity": Metric(
        "Fréchet distance, N → ∞",
        "lower",
        "between samples and training images, extrapolated to infinitely many of both; mean over four "
        "small classifiers, each trained on one half of the training images and compared on the other "
        "(not FID)",
    ),
    "fd_classifier": Metric(
        "Fréchet distance",
        "lower",
        "between samples and training images, on the features of a small classifier of the data set "
        "(not FID)",
    ),
    "fd_dinov2": Metric(
        "Fréchet distance, DINOv2",
        "lower",
        "between samples and training images, on DINOv2's features",
    ),
    "fid": Metric("FID", "lower", "Fréchet distance on Inception's features"),
    "sfid": Metric("sFID", "lower", "Fréchet distance on Inception's spatial features"),
    "inception_score": Metric("Inception Score", "higher", "of samples, as the ADM suite has it"),
    "class_consistency": Metric(
        "class consistency",
        "higher",
        "share of conditional samples that the classifier recognises as their class",
    ),
    "linear_probe": Metric(
        "linear probe",
        "higher",
        "held-out accuracy of a linear classifier on the mean token of the teacher's block",
    ),
    "generalisation_gap": Metric(
        "generalisation gap",
        "lower",
        "held-out minus training denoising loss, both measured the same way with the EMA weights",
    ),
    BEST: Metric(
        "held-out loss, best on the way",
        "lower",
        "the least held-out loss that was measured while training went on, on fewer pairs: what stopping in "
        "time would have kept",
    ),
    "heldout_raw": Metric(
        "held-out loss, raw weights", "lower", "as the held-out loss, without the moving average"
    ),
    "heldout_separated": Metric(
        "held-out loss, separated",
        "lower",
        "as the held-out loss, with attention separated into the variant's own token groups, or a quarter "
        "and the rest where it has none",
    ),
    "heldout_dual": Metric(
        "held-out loss, two timesteps",
        "lower",
        "as the held-out loss, with a timestep for each of these groups and full attention",
    ),
    "training_loss": Metric(
        "training denoising loss",
        "lower",
        "as the held-out loss, on training images",
    ),
    "label_reliance": Metric(
        "label reliance",
        "",
        "held-out denoising loss without labels minus that with them, on the same images, timesteps and "
        "noise: how much the model makes of a label, which is no quality",
    ),
    "memorised_share": Metric(
        "memorised share",
        "",
        "share of samples that are nearer to one training image than to any other by a ratio that 5 % of "
        "held-out images reach; fresh data has .05",
    ),
    "planted_copies_found": Metric(
        "planted copies found",
        "",
        "the share of noised copies of training images that the same test finds: its positive control",
    ),
    "precision": Metric(
        "precision", "higher", "share of samples inside the training images' balls"
    ),
    "recall": Metric("recall", "higher", "share of training images inside the samples' balls"),
}
"""In the order in which reports show them; a study has those that its runs measured."""

DISTANCES = ("fd_infinity", "fd_classifier", "fd_dinov2", "fid")
"""Fréchet distances, which are measured on the way too; the first that a study has is its headline."""


@dataclass(frozen=True)
class RunResult:
    """One finished run."""

    variant: str
    seed: int
    train_fraction: float
    """Share of the training images that it was trained on."""
    folder: str
    """Of the run, below the study's."""
    config: dict[str, Any]
    """The resolved tree."""
    parameters: int
    flops_per_step: float
    seconds_per_step: float
    """Median over the run's logged steps."""
    seconds: float
    """Of training, over all sittings, without what was measured on the way."""
    metrics: dict[str, float]
    """Final values, by the names of METRICS."""
    heldout_by_timestep: Sequence[float]
    """Final held-out loss within ten equal bins of t."""
    reliance_by_timestep: Sequence[float] = ()
    """Label reliance within these bins."""
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """(step, value) while training went on, of heldout_loss and the Fréchet distance."""
    versions: Mapping[str, str] = field(default_factory=dict)
    heldout_images: Mapping[str, float] = field(default_factory=dict)
    """Metrics of samples, of as many real held-out images in their place: what a perfect model reaches."""


def write_result(folder: Path, result: RunResult) -> None:
    """Write a run's result.json, whole or not at all."""
    text = json.dumps(asdict(result), indent=1) + "\n"
    write_whole(folder / RESULT_FILE, lambda path: path.write_text(text))


def read_result(folder: Path) -> RunResult | None:
    """A run's result, or None while there is none."""
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    result = checked(read_plain(path, finite=False), RunResult, path)  # one that diverged holds NaN
    for name, value in (*result.metrics.items(), *result.heldout_images.items()):
        require_measurable([value], name, path)
    for name, curve in result.curves.items():
        require_measurable((value for _, value in curve), name, path)
    for name in ("heldout_by_timestep", "reliance_by_timestep"):
        require_measurable(getattr(result, name), name, path)
    if points := result.curves.get("heldout_loss"):
        least = min((loss for _, loss in points if not math.isnan(loss)), default=math.nan)
        result = replace(result, metrics={**result.metrics, BEST: least})
    return result


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result."""

    name: str
    message: str
    """One line."""
    log: str
    """Its log file, below the study's folder."""


@dataclass(frozen=True)
class StudyResults:
    """A study and what is known of its runs."""

    study: Study
    done: tuple[RunResult, ...]
    failed: tuple[Failure, ...] = ()
    waiting: tuple[str, ...] = ()
    """Names of the runs that have neither."""
    folder: Path | None = None
    """The study's, where the runs' held-out errors are."""

    def pair_errors(self, runs: Sequence[RunResult], metric: str) -> PairErrors | None:
        """The errors behind a metric of runs that differ in variant or seed; None unless all have kept them.

        Raises:
            UserError: a file of them is damaged.
        """
        files = {(run.variant, run.seed): self._errors_file(run) for run in runs}
        if not files or None in files.values():
            return None
        kept = {
            cell: _read_errors(path, metric) for cell, path in files.items() if path is not None
        }
        found = {cell: arrays for cell, arrays in kept.items() if arrays is not None}
        if len(found) < len(files):
            return None
        first = next(iter(found.values()))
        for errors, images, bins in found.values():
            same = np.array_equal(images, first[1]) and np.array_equal(bins, first[2])
            if not same or not np.isfinite(errors).all():
                return None  # measured on other pairs, or diverged
        return PairErrors(
            {cell: e.astype(np.float64) for cell, (e, _, _) in found.items()}, *first[1:]
        )

    def _errors_file(self, run: RunResult) -> Path | None:
        path = None if self.folder is None else self.folder / run.folder / ERRORS_FILE
        return path if path is not None and path.is_file() else None


def _read_errors(path: Path, metric: str) -> tuple[Array, Array, Array] | None:
    arrays = Npz(path)
    size = sum(member.file_size for member in arrays.members.values())
    if size > MAX_RATIO * path.stat().st_size:
        raise UserError(f"{path} is damaged: it unpacks to {size:,} bytes, and is written unpacked")
    if metric not in arrays:
        return None
    if missing := {"images", "bins"} - arrays.keys():
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    found = arrays[metric], arrays["images"], arrays["bins"]
    if len({array.shape for array in found}) != 1 or found[0].ndim != 1 or found[0].size < 2:
        raise UserError(f"{path} is damaged: needed are as many errors as images and bins")
    if found[0].dtype.kind != "f":
        raise UserError(f"{path} is damaged: its errors are {found[0].dtype}")
    for name, numbers, most in (
        ("images", found[1], 2 * found[1].size),
        ("bins", found[2], MAX_BINS),
    ):
        if numbers.dtype.kind != "i" or numbers.min() < 0 or numbers.max() >= most:
            raise UserError(f"{path} is damaged: {name} are no numbers from 0 to {most - 1:,}")
    if len(np.unique(found[2])) <= found[2].max():
        raise UserError(f"{path} is damaged: a bin has no pairs")
    return found


def _require_its_own(result: RunResult, job: Job, path: Path) -> None:
    """Refuse a result that lies in another run's place, or that says that its run is elsewhere."""
    expected = (job.variant, job.seed, job.train_fraction, f"{RUNS}/{job.name}")
    if (result.variant, result.seed, result.train_fraction, result.folder) != expected:
        raise UserError(f"{path} is the result of another run: of {result.folder!r}")


def read_results(folder: Path) -> StudyResults:
    """What a study's folder holds now, finished or not.

    Raises:
        UserError: there is no study in it, or something in it is damaged.
    """
    study = read_study(folder)
    if study.registration is not None and (
        unknown := sorted(set(study.registration.metrics) - METRICS.keys())
    ):
        raise UserError(
            f"{folder / STUDY_FILE}: registration.metrics has the unknown {unknown[0]!r}"
        )
    done, failed, waiting = [], [], []
    for job in study.jobs():
        run = folder / RUNS / job.name
        if (result := read_result(run)) is not None:
            _require_its_own(result, job, run / RESULT_FILE)
            done.append(result)
        elif (failure := run.with_suffix(FAILED_SUFFIX)).is_file():
            log = run.with_suffix(".log")
            said = printable(read_bytes(failure, MAX_MESSAGE).decode(errors="backslashreplace"))
            failed.append(Failure(job.name, said, str(log.relative_to(folder))))
        else:
            waiting.append(job.name)
    return StudyResults(study, tuple(done), tuple(failed), tuple(waiting), folder)

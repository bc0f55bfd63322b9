"""One run of a study: trained or gone on with, measured, and its result written.

`python -m selfalign.study.job STUDY NAME` is what launchers start.
"""

import contextlib
import dataclasses
import math
import os
import platform
import signal
import statistics
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

import selfalign
from selfalign.backbones import find_tap
from selfalign.benchmark.cost import step_cost
from selfalign.config import config_to_dict, override
from selfalign.data.datasets import open_data
from selfalign.data.source import DataSource
from selfalign.disk import locked, write_arrays, write_whole
from selfalign.errors import UserError
from selfalign.evaluation.config import EvaluationConfig, MetricName
from selfalign.evaluation.evaluate import evaluate
from selfalign.evaluation.report import Evaluation
from selfalign.evaluation.setup import default_features
from selfalign.inspect.labels import label_reliance
from selfalign.inspect.probes import linear_probe
from selfalign.names import printable
from selfalign.processes import open_accelerator
from selfalign.runs.load import LoadedRun, load_run
from selfalign.runs.monitors import CurvesMonitor, HeldOutMonitor
from selfalign.runs.start import resume_run, start_run
from selfalign.study.plan import Job, read_study
from selfalign.study.results import (
    DISTANCES,
    ERRORS_FILE,
    FAILED_SUFFIX,
    METRICS,
    RUNS,
    RunResult,
    read_result,
    write_result,
)
from selfalign.study.settings import Measurement
from selfalign.study.verdicts import HELDOUT_LOSS
from selfalign.training.heldout import (
    WHOLE,
    HeldOutErrors,
    Seen,
    heldout_errors,
    heldout_loss,
    summarise,
)
from selfalign.training.loop import TrainingState
from selfalign.training.tracking import read_metrics

USUAL_RATIOS = (0.25, 0.75)
"""Token groups in which variants without any are scored."""
RELIANCE = "label_reliance"


def run_job(study_folder: Path, name: str, parent: int | None = None) -> RunResult | None:
    """Bring one run of a study to its result, from wherever it stands.

    Args:
        study_folder: where study.json is.
        name: of the job.
        parent: the process that started this one; when it is gone, the run stops at a checkpoint.

    Returns:
        The result; None if the run was stopped on the way, and can be gone on with.

    Raises:
        UserError: no such job, or what the run raised.
    """
    study = read_study(study_folder)
    job = next((job for job in study.jobs() if job.name == name), None)
    if job is None:
        raise UserError(f"{study_folder} has no run {name!r}")
    folder = study_folder / RUNS / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A study that was killed may have left this very run behind, still stopping.
    with locked(folder.parent, busy=None, name=f"{folder.name}.lock"):
        if (result := read_result(folder)) is not None:
            return result
        if job.after is not None:
            # The run that it starts from: made here and now, or waited for, where it is not there yet.
            if run_job(study_folder, job.after.name, parent) is None:
                return None
            start = str(study_folder / RUNS / job.after.name)
            config = override(job.config, {"training.start_from": start})
            job = dataclasses.replace(job, config=config)
        if not _train(job, folder, study.measurement, parent):
            return None
        result = _measure(job, folder, study.measurement)
        write_result(folder, result)
        return result


@dataclass(frozen=True)
class EvaluationMonitor:
    """Evaluates samples on the way, as the end of the run does."""

    every: int
    measurement: Measurement

    def __call__(self, state: TrainingState) -> None:
        """Write the Fréchet distance to the metrics; the last step is left to the end of the run."""
        num = self.measurement.on_the_way
        if state.metrics is None or num == 0 or state.step == state.config.training.steps:
            return
        run = LoadedRun(state.folder, state.config, state.ema.model, state.step)
        evaluation = _evaluate(run, self.measurement, (), state.accelerator, num)
        distances = {k: v.value for k, v in evaluation.metrics.items() if k in DISTANCES}
        state.metrics.write(state.step, distances)


def _train(job: Job, folder: Path, measurement: Measurement, parent: int | None) -> bool:
    """Train to the last step. False if the run was stopped before."""

    def progress(state: TrainingState, values: dict[str, float]) -> None:
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)  # which the loop answers with a checkpoint

    every = job.config.training.evaluate_every
    # No grids of their own: the samples of all runs are evaluated, and the report shows them.
    monitors = (
        HeldOutMonitor(every),
        EvaluationMonitor(every, measurement),
        CurvesMonitor(every=0),
    )
    if (folder / "config.json").exists():
        state = resume_run(folder, None, progress, monitors)
    else:
        state = start_run(job.config, folder, progress, monitors)
    return state is None or state.step == job.config.training.steps


def _evaluate(
    run: LoadedRun,
    measurement: Measurement,
    further: tuple[MetricName, ...],
    accelerator: Accelerator,
    num: int | None = None,
) -> Evaluation:
    """The Fréchet distance of a run's samples, and further metrics as far as their features are there."""
    features = measurement.features or default_features(run.config.data)
    name = measurement.distance(run.config.data.source.small, num)
    distance = {"fid": "fid", "fd_infinity": "fd-infinity"}.get(name, "fd")
    impossible = set() if features == "inception" else {"sfid", "is"}
    if features != "classifier":
        impossible |= {"consistency", "memorisation"}
    sampling = measurement.sampling
    if measurement.own_samples:
        sampling = dataclasses.replace(sampling, seed=sampling.seed + run.config.seed)
    evaluation = evaluate(
        run.folder,
        EvaluationConfig(
            num=num or measurement.num,
            features=features,
            metrics=(distance, *(name for name in further if name not in impossible)),
        ),
        sampling,
        accelerator,
        run=run,
    )
    assert evaluation is not None, "a study's runs are of one process"
    return evaluation


def _measure(job: Job, folder: Path, measurement: Measurement) -> RunResult:
    accelerator = open_accelerator()
    run = load_run(folder, device=accelerator.device)
    source = open_data(run.config.data)
    training = run.config.training
    evaluation = _evaluate(
        run,
        measurement,
        ("sfid", "is", "precision-recall", "consistency", "memorisation"),
        accelerator,
    )
    lines = read_metrics(folder)
    errors = _heldout(run, source, measurement, accelerator)
    whole = errors[HELDOUT_LOSS]
    arrays = {"images": whole.images, "bins": whole.bins}
    arrays |= {name: found.errors.float() for name, found in errors.items()}
    write_arrays(folder / ERRORS_FILE, {name: array.numpy() for name, array in arrays.items()})
    losses = {name: summarise(found) for name, found in errors.items()}
    on_training = heldout_loss(
        run.model, source.train, run.config.flow.path, _pairs(run, measurement)
    ).overall
    metrics = {
        **{name: loss.overall for name, loss in losses.items()},
        "training_loss": on_training,
        "generalisation_gap": losses[HELDOUT_LOSS].overall - on_training,
        **{k: v.value for k, v in evaluation.metrics.items() if k in METRICS},
    }
    if source.num_classes >= 2:
        block = find_tap(run.config.targets["ema"].block, run.config.depth, "targets.ema.block")
        metrics["linear_probe"] = linear_probe(run.model, source, run.config.flow.path, block)
    curves = {HELDOUT_LOSS: [(x["step"], x["heldout_ema"]) for x in lines if "heldout_ema" in x]}
    for name in DISTANCES:
        points = [(line["step"], line[name]) for line in lines if name in line]
        if name in metrics and points:
            curves[name] = [*points, (run.step, metrics[name])]
    cost = step_cost(run.config, training.batch_size)
    rates = [x["samples_per_second"] for x in lines if x.get("samples_per_second")]
    seconds = [training.batch_size / rate for rate in rates] or [math.nan]
    return RunResult(
        variant=job.variant,
        seed=job.seed,
        train_fraction=job.train_fraction,
        folder=f"{RUNS}/{job.name}",
        config=config_to_dict(run.config),
        parameters=cost.parameters,
        flops_per_step=cost.flops,
        seconds_per_step=statistics.median(seconds),
        seconds=sum(seconds) / len(seconds) * run.step,
        metrics=metrics,
        heldout_by_timestep=losses[HELDOUT_LOSS].by_timestep,
        reliance_by_timestep=losses[RELIANCE].by_timestep if RELIANCE in losses else (),
        curves=curves,
        heldout_images={k: v.value for k, v in evaluation.baseline.items() if k in METRICS},
        versions={
            "selfalign": selfalign.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": f"{accelerator.device}, {torch.get_num_threads()} threads",
        },
    )


def _pairs(run: LoadedRun, measurement: Measurement) -> int:
    return measurement.heldout_pairs or run.config.training.heldout_samples


def _heldout(
    run: LoadedRun, source: DataSource, measurement: Measurement, accelerator: Accelerator
) -> dict[str, HeldOutErrors]:
    """Every variant's errors on the same pairs, shown in the same ways: by metric."""
    config = run.config
    several = config.views.mask_ratios if config.num_groups > 1 else USUAL_RATIOS
    raw = load_run(run.folder, "raw", accelerator.device, step=run.step).model
    ways = {
        HELDOUT_LOSS: (run.model, WHOLE),
        "heldout_raw": (raw, WHOLE),
        "heldout_separated": (run.model, Seen(several, separate=True)),
        "heldout_dual": (run.model, Seen(several, several_timesteps=True)),
    }
    pairs, path = _pairs(run, measurement), config.flow.path
    found = {
        name: heldout_errors(model, source.heldout, path, pairs, seen=seen)
        for name, (model, seen) in ways.items()
    }
    if source.num_classes and config.views.class_dropout > 0:
        told = found[HELDOUT_LOSS]
        found[RELIANCE] = label_reliance(run.model, source.heldout, path, pairs, told=told)
    return found


def mark_failed(study_folder: Path, name: str, error: Exception) -> None:
    """Leave one line beside the run's folder that says why it has no result."""
    message = " ".join(str(error).split())
    line = message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"
    mark = (study_folder / RUNS / name).with_suffix(FAILED_SUFFIX)
    write_whole(mark, lambda path: path.write_text(f"{line}\n"))


def main() -> int:
    """Run a job in this process: 0 is done, 2 failed, 128+n stopped by signal n."""
    study_folder, name = Path(sys.argv[1]), sys.argv[2]
    try:
        result = run_job(study_folder, name, parent=os.getppid())
    except Exception as error:  # noqa: BLE001 – whatever it is, the study reports it and goes on
        if isinstance(error, UserError):
            print(f"selfalign: error: {printable(str(error))}", file=sys.stderr)
        else:
            traceback.print_exc()
        with contextlib.suppress(UserError):  # as on a full disk; the exit code says it too
            mark_failed(study_folder, name, error)
        return 2
    return 0 if result is not None else 128 + signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main())

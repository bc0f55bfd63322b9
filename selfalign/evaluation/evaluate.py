"""From a run or a set of samples to a table of metrics, `evaluation.json` and a picture."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator

from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.evaluation.config import EvaluationConfig, Progress
from selfalign.evaluation.fitting import available, check_fit
from selfalign.evaluation.generation import PlannedSamples, make_samples
from selfalign.evaluation.metrics import Evidence, Finding, Metric, aims, choose
from selfalign.evaluation.output import report_folder, require_place, write_evaluation
from selfalign.evaluation.picture import draw_evaluation, nearest_in_features
from selfalign.evaluation.record import how_made, notes, settings
from selfalign.evaluation.reference import measure, write_reference
from selfalign.evaluation.report import SHOWN, Evaluation
from selfalign.evaluation.setup import open_setup
from selfalign.processes import together
from selfalign.runs.load import LoadedRun
from selfalign.sampling.settings import SamplingConfig


def evaluate(
    subject: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    accelerator: Accelerator,
    progress: Progress = lambda what, done, total: None,
    run: LoadedRun | None = None,
) -> Evaluation | None:
    """Evaluate a run, or a set of samples; writes evaluation.json and evaluation.png.

    Everything is opened and checked first; only then is anything sampled, computed or written.

    Args:
        subject: a run's folder, a .npz of samples, or a folder of images.
        config: what to compare with, and how.
        sampling: how a run is sampled.
        accelerator: processes and device.
        progress: told of long work.
        run: the subject, where it is a run that is loaded already.

    Returns:
        What was measured, in the main process; None in the others, which only share the work.

    Raises:
        UserError: inputs that are missing, damaged, or do not fit together or the metrics.
    """
    with together(accelerator):
        if accelerator.is_main_process:
            require_place(subject, config.out)
    setup = open_setup(subject, config, sampling, accelerator, progress, run)
    with together(accelerator):
        sizes = check_fit(setup)
        chosen, left_out = choose(config.metrics, available(setup, sizes))
        folder = report_folder(setup)
        made = how_made(setup)

    reference = measure(setup.reference, setup.network, setup.parts, accelerator)
    with together(accelerator):
        if config.write_reference is not None and accelerator.is_main_process:
            write_reference(config.write_reference, reference, setup.network)

    samples = setup.samples
    if isinstance(samples, PlannedSamples):
        samples = make_samples(samples, config.batch_size, accelerator, progress)
    evidence = Evidence(setup, samples, setup.features(samples, _read_by(chosen)), reference)
    fresh = _heldout_evidence(evidence, chosen, sizes)

    evaluation = None
    with together(accelerator):
        if accelerator.is_main_process:
            progress("metrics", 0, 1)
            found = _measure(chosen, evidence)
            baseline = _measure(*fresh) if fresh else Finding()
            rows = found.rows or nearest_in_features(evidence)
            progress("metrics", 1, 1)
            evaluation = Evaluation(
                folder,
                found.estimates,
                baseline.estimates,
                found.losses,
                settings(evidence, made),
                [*notes(evidence, found), *left_out],
                aims(setup.network.name),
            )
            write_evaluation(evaluation)
            shown = samples.read(range(min(len(samples), SHOWN * 6)))
            title = f"{len(samples)} samples of {subject}"
            sides = setup.source.image_size if setup.source is not None else ()
            write_whole(
                folder / "evaluation.png",
                lambda path: draw_evaluation(path, shown, rows, evaluation, title, sides),
            )
    return evaluation


def _read_by(metrics: Sequence[Metric]) -> frozenset[str]:
    """Kinds of features that metrics read; if any, the picture and notes read `features` too."""
    read: frozenset[str] = frozenset().union(*(metric.reads for metric in metrics))
    return read | {"features"} if read else read


def _heldout_evidence(
    evidence: Evidence, chosen: Sequence[Metric], sizes: Mapping[str, int]
) -> tuple[list[Metric], Evidence] | None:
    """Held-out images in the place of samples, and the metrics that are measured of them too."""
    setup, heldout = evidence.setup, evidence.setup.reference.heldout
    if heldout is None:
        return None
    # As many as samples, where there are: the bias of a Fréchet distance goes with the number.
    images = heldout.first(min(len(heldout), len(evidence.samples)))
    there = available(dataclasses.replace(setup, samples=images), sizes)
    metrics = [m for m in chosen if m.of_heldout and m.lacks(there) is None]
    if not metrics:
        return None
    features = setup.features(images, _read_by(metrics))
    return metrics, dataclasses.replace(evidence, samples=images, features=features)


def _measure(metrics: Sequence[Metric], evidence: Evidence) -> Finding:
    """What all of them found.

    Raises:
        UserError: a value that is no number, which would say nothing.
    """
    found = [metric.measure(evidence) for metric in metrics]
    estimates = {name: e for finding in found for name, e in finding.estimates.items()}
    for name, estimate in estimates.items():
        if not math.isfinite(estimate.value + estimate.standard_error):
            raise UserError(
                f"{name} of {evidence.samples.name} against {evidence.reference.name} is "
                f"{estimate.value:g} ± {estimate.standard_error:g}: their features are too large to "
                "compare"
            )
    return Finding(
        estimates,
        [row for finding in found for row in finding.rows],
        {weights: loss for finding in found for weights, loss in finding.losses.items()},
    )

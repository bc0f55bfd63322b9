"""`selfalign evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from accelerate import Accelerator
from rich.table import Table

from selfalign.cli.console import console, make_bar, parse
from selfalign.evaluation.evaluate import EvaluationConfig, evaluate
from selfalign.evaluation.report import Evaluation, aim
from selfalign.processes import together
from selfalign.sampling.generate import SamplingConfig


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate a run or a set of samples."""

    subject: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, a .npz of samples, or a folder of images."""
    config: Annotated[EvaluationConfig, tyro.conf.arg(name="")]
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")]


def evaluate_command(arguments: Sequence[str]) -> int:
    """`selfalign evaluate`."""
    accelerator = Accelerator()
    with together(accelerator):
        parsed = parse(
            EvaluateArguments,
            arguments,
            "selfalign evaluate",
            "Evaluate a run (sampled now, or continued where that stopped), a .npz of samples or a "
            "folder of images: writes evaluation.json and evaluation.png. "
            "Examples: selfalign evaluate runs/digits --num 1000; selfalign evaluate samples.npz "
            "--reference VIRTUAL_imagenet256_labeled.npz --features inception",
        )
    bar = make_bar("{task.description}", disable=not accelerator.is_main_process)
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what)
        bar.update(tasks[what], completed=done, total=total)

    with bar, together(accelerator):
        evaluation = evaluate(parsed.subject, parsed.config, parsed.sampling, accelerator, show)
    if evaluation is not None:
        _print_evaluation(evaluation)
    return 0


def _print_evaluation(evaluation: Evaluation) -> None:
    """The metrics, what they are of held-out images, and where the report is."""
    settings = evaluation.settings
    table = Table("metric", "samples", "held-out images", "aim", box=None)
    for name, estimate in evaluation.metrics.items():
        baseline = evaluation.baseline.get(name)
        fresh = f"{baseline.value:.4g} ± {baseline.standard_error:.2g}" if baseline else "–"
        value = f"{estimate.value:.4g} ± {estimate.standard_error:.2g}"
        table.add_row(name, value, fresh, aim(name))
    for weights, loss in evaluation.denoising.items():
        value = f"{loss.overall:.4f} ± {loss.standard_error:.2g}"
        table.add_row(f"held-out denoising loss, {weights}", value, "–", "lower")
    console.print(table)
    features = settings["features"]
    if "heldout_accuracy" in features:
        console.print(
            f"classifier trained on {features['trained_on']}: recognises "
            f"{features['heldout_accuracy']:.2%} of the held-out images"
        )
    for note in evaluation.notes:
        console.print(f"note: {note}")
    console.print(
        f"{settings['samples']['count']} samples against {settings['reference']['name']}: "
        f"{evaluation.folder / 'evaluation.json'}, {evaluation.folder / 'evaluation.png'}"
    )

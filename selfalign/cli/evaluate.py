"""`selfalign evaluate`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from selfalign.cli.console import console, importing, make_bar, parse
from selfalign.cli.tree import options_of, restore
from selfalign.errors import UserError
from selfalign.evaluation.config import EvaluationConfig
from selfalign.evaluation.protocols import PROTOCOLS
from selfalign.names import printable
from selfalign.sampling.settings import SamplingConfig

if TYPE_CHECKING:
    from selfalign.evaluation.report import Evaluation

    ProtocolName = str
else:
    ProtocolName = Literal[tuple(PROTOCOLS)]

_WEIGHTS = re.compile(r"raw|ema(:[\d.]+)?")


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate a run or a set of samples."""

    subject: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, a .npz of samples, or a folder of images."""
    config: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(
        default_factory=EvaluationConfig
    )
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: options_of(SamplingConfig())
    )
    protocol: ProtocolName | None = None
    """Evaluate as a paper did: sets reference, features, number and balance of labels, splits, solver,
    steps and guidance; options that are given win over it."""


def evaluate_command(arguments: Sequence[str]) -> int:
    """`selfalign evaluate`."""
    code = 0
    commands = _sweep(arguments)
    if len(commands) > 1:
        _require_weights([_parse(words) for words in commands])
    for words in commands:
        parsed = _parse(words)
        if parsed.protocol is not None:  # in front, so that options that are given win
            parsed = _parse([*PROTOCOLS[parsed.protocol].options(), *words])
        code = code or _evaluate(parsed)
    return code


def _sweep(arguments: Sequence[str]) -> list[list[str]]:
    """The same command for each of several weights after `--weights`."""
    words = list(arguments)
    if "--weights" not in words:
        return [words]
    first = words.index("--weights") + 1
    names = list(itertools.takewhile(_WEIGHTS.fullmatch, words[first:]))
    rest = words[first + len(names) :]
    if len(names) < 2:
        return [words]
    if "--out" in words:
        raise UserError(
            f"--weights are {', '.join(names)}, and --out takes one evaluation: leave --out out, or name one"
        )
    return [[*words[:first], name, *rest] for name in names]


def _require_weights(commands: Sequence[EvaluateArguments]) -> None:
    """Refuse a sweep of which a later part could not be done, before the first is."""
    with importing():
        from selfalign.runs.folder import read_record
        from selfalign.training.checkpoint import weights_file

    for command in commands:
        decays = read_record(command.subject).config.training.ema_decays
        weights_file(command.config.weights, decays)


def _parse(arguments: Sequence[str]) -> EvaluateArguments:
    parsed = parse(
        EvaluateArguments,
        arguments,
        "selfalign evaluate",
        "Evaluate a run (sampled now, or continued where that stopped), a .npz of samples or a "
        "folder of images: writes evaluation.json and evaluation.png. "
        "Examples: selfalign evaluate runs/digits --num 1000; selfalign evaluate samples.npz "
        "--reference VIRTUAL_imagenet256_labeled.npz --features inception; selfalign evaluate "
        "runs/imagenet --protocol repa",
    )
    return replace(parsed, sampling=restore(parsed.sampling, SamplingConfig()))


def _evaluate(parsed: EvaluateArguments) -> int:
    with importing():
        from selfalign.evaluation.evaluate import evaluate
        from selfalign.processes import open_accelerator, together

    accelerator = open_accelerator()
    if parsed.protocol is not None and accelerator.is_main_process:
        protocol = PROTOCOLS[parsed.protocol].overridden(parsed.config, parsed.sampling)
        console.print(f"protocol {parsed.protocol}: {' '.join(protocol.options())}")
    bar = make_bar("{task.description}", disable=not accelerator.is_main_process)
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(printable(what))
        bar.update(tasks[what], completed=done, total=total)

    with bar, together(accelerator):
        evaluation = evaluate(parsed.subject, parsed.config, parsed.sampling, accelerator, show)
    if evaluation is not None:
        _print_evaluation(evaluation)
    return 0


def _print_evaluation(evaluation: Evaluation) -> None:
    """The metrics, what they are of held-out images, and where the report is."""
    from rich.table import Table

    settings = evaluation.settings
    made = settings["samples"]["sampling"] or {}
    if made.get("weights", "ema") != "ema":
        console.print(f"weights {made['weights']}")
    table = Table("metric", "samples", "held-out images", "aim", box=None)
    for name, estimate in evaluation.metrics.items():
        baseline = evaluation.baseline.get(name)
        fresh = f"{baseline.value:.4g} ± {baseline.standard_error:.2g}" if baseline else "–"
        value = f"{estimate.value:.4g} ± {estimate.standard_error:.2g}"
        table.add_row(name, value, fresh, evaluation.aim(name).best)
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
        console.print(f"note: {printable(note)}")
    reference = printable(settings["reference"]["name"])
    folder = printable(str(evaluation.folder))
    console.print(
        f"{settings['samples']['count']} samples against {reference}: {folder}/evaluation.json, "
        f"{folder}/evaluation.png"
    )

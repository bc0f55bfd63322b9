"""`selfalign train`."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from selfalign.cli.console import MovedData, console, importing, parse, shows_bars
from selfalign.cli.tree import build_tree, options_of
from selfalign.config import OLDER_NAMES, RunConfig
from selfalign.environment import is_first_process
from selfalign.errors import UserError
from selfalign.recipes import RECIPES, recipe


@dataclass(frozen=True)
class TrainArguments:
    """Train a new run."""

    out: Path
    """Folder of the run; new or empty."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class ResumedTraining:
    """What may change on resuming."""

    steps: int | None = None
    """Optimizer steps in all; left out: as the run was started."""
    gradient_accumulation: int | None = None
    """Micro-batches per optimizer step and process; left out: as before."""
    sharding: Literal["none", "gradients", "full"] | None = None
    """What processes hold; left out: as before."""


@dataclass(frozen=True)
class ResumedData(MovedData):
    """Where the data is, and what became of it."""

    accept_changes: bool = False
    """Go on without the images that are gone; the rest keeps its order."""


@dataclass(frozen=True)
class ResumeArguments:
    """Go on with a run from a checkpoint."""

    resume: Path
    """Folder of the run."""
    training: ResumedTraining
    data: ResumedData
    step: int | None = None
    """Step of the checkpoint to go on from; what came after it is dropped. Left out: the last one."""


def train_command(arguments: Sequence[str]) -> int:
    """`selfalign train`."""
    usage = (
        "usage: selfalign train RECIPE --out DIR [--init RUN|FILE] [--SECTION.FIELD VALUE …]\n"
        "       selfalign train RECIPE --backbone diffusers:FOLDER --out DIR\n"
        "       selfalign train --config FILE --out DIR [--SECTION.FIELD VALUE …]\n"
        "       selfalign train RECIPE [--SECTION.FIELD VALUE …] --write-config FILE\n"
        "       selfalign train --resume DIR [--training.steps N] [--data.root DIR] [--step N]\n\n"
        f"recipes: {', '.join(RECIPES)}\n"
        "every setting of a recipe: selfalign train RECIPE --help\n"
        "example: selfalign train sra-dts-as --out runs/digits --data.name digits "
        "--model.size tiny --training.steps 1000"
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(usage)
        return 0
    words = [_ALIASES.get(word, word) for word in arguments]
    file, target = _take(words, "--config"), _take(words, "--write-config")
    if file is not None or not words[0].startswith("-"):
        name, summary, base = _base(words, file)
        trains = target is None or any(word.partition("=")[0] == "--out" for word in words)
        words += [] if trains else ["--out", "."]
        parsed = parse(
            TrainArguments,
            [_current_name(word) for word in _spelt_out(words)],
            f"selfalign train {name}",
            f"{summary}. Example: selfalign train {name} --out runs/digits --data.name digits "
            "--model.size tiny",
            config=options_of(base),
        )
        config = build_tree(parsed.config, base)
        if target is not None:
            from selfalign.config_file import write_config_file

            write_config_file(Path(target), config)
            console.print(f"{target}: train it with selfalign train --config {target} --out DIR")
        if not trains:
            return 0
        with importing():
            from selfalign.runs.start import resume_run, start_run

        with _progress() as progress:
            # What torchrun starts again (--max-restarts) is the same command line.
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            if again and (parsed.out / "config.json").is_file():
                restarted = resume_run(parsed.out, None, progress, found=_found)
                return 0 if restarted is None else _report(restarted)
            state = start_run(config, parsed.out, progress, found=_found)
    else:
        resumed = parse(
            ResumeArguments,
            arguments,
            "selfalign train",
            "Go on with a run from its last checkpoint. "
            "Example: selfalign train --resume runs/digits --training.steps 2000",
        )
        with importing():
            from selfalign.runs.start import resume_run

        with _progress() as progress:
            going_on = resume_run(
                resumed.resume,
                resumed.training.steps,
                progress,
                found=_found,
                step=resumed.step,
                data_root=resumed.data.root,
                accept_changes=resumed.data.accept_changes,
                gradient_accumulation=resumed.training.gradient_accumulation,
                sharding=resumed.training.sharding,
            )
        if going_on is None:
            if is_first_process():
                console.print(
                    f"{resumed.resume} is finished: all its steps are done; --training.steps takes a "
                    "larger number"
                )
            return 0
        state = going_on
    return _report(state)


def _spelt_out(words: Sequence[str]) -> Iterator[str]:
    """`--backbone NAME[:FOLDER]` as the settings that it stands for."""
    wanted = False
    for word in words:
        option, equals, value = word.partition("=")
        if wanted or (option == "--backbone" and equals):
            name, colon, folder = (word if wanted else value).partition(":")
            yield from ("--model.backbone", name)
            if colon:
                yield from (f"--backbones.{name}.folder", folder)
        elif option != "--backbone":
            yield word
        wanted = word == "--backbone"
    if wanted:
        yield "--model.backbone"  # which misses its value, as the message says


_ALIASES = {"--init": "--training.start-from"}
"""Shorter words for options."""


def _take(words: list[str], option: str) -> str | None:
    """Take an option and its value out of a command's words."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            value = value if equals else next(iter(words[index + 1 :]), "")
            if not value or value.startswith("--"):
                raise UserError(
                    f"{option} names no file: allowed is one that ends in .yaml or .json"
                )
            del words[index : index + (1 if equals else 2)]
            return value
    return None


def _base(words: list[str], file: str | None) -> tuple[str, str, RunConfig]:
    """What options are put on: a file's tree, or the recipe that stands first, which is taken out."""
    if file is None:
        name = words.pop(0)
        return name, f"{name}: {RECIPES[name].summary}" if name in RECIPES else "", recipe(name)
    if words and not words[0].startswith("-"):
        raise UserError(
            f"--config is {file}, and {words[0]!r} stands beside it: the file says what it begins with, by "
            "its key recipe"
        )
    from selfalign.config_file import read_config

    return (
        f"--config {file}",
        f"The settings of {file}, and options on top",
        read_config(Path(file)),
    )


def _current_name(word: str) -> str:
    """An option of version 0.1.0 by its present name."""
    option, equals, value = word.partition("=")
    section, _, field = option.removeprefix("--").replace("-", "_").partition(".")
    negated = "no_" * field.startswith("no_")
    name = OLDER_NAMES.get(f"{section}.{field.removeprefix('no_')}")
    if name is None:
        return word
    parent, _, field = name.rpartition(".")
    return f"--{parent}.{negated}{field}{equals}{value}"


class _TwoLines(Progress):
    """A bar, and a line below it, so that both fit a narrow terminal."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.below)


def _found(source: Any) -> None:
    """Say what was found where a `DataSource` was opened."""
    for line in source.summary.lines():
        console.print(line, markup=False, highlight=False)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Any, dict[str, float]], None]]:
    """A live bar on a terminal, a line now and then elsewhere; the main process only."""
    bar = _TwoLines(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        disable=not shows_bars(),
    )
    task: Any = None
    begun, first_step, printed = time.perf_counter(), 0, 0.0

    def show(state: Any, values: dict[str, float]) -> None:
        nonlocal task, first_step, printed
        if not state.accelerator.is_main_process:
            return
        total = state.config.training.steps
        terms = ", ".join(
            f"{name.removesuffix('_loss')} {value:.4f}"
            for name, value in values.items()
            if name.endswith("_loss")
        )
        losses = f"loss {values['loss']:.4f} ({terms}) {values['samples_per_second']:.0f} samples/s"
        now = time.perf_counter()
        if not bar.disable:
            if task is None:
                task = bar.add_task("", total=total, completed=state.step)
            bar.below = losses
            bar.update(task, completed=state.step)
        elif now - printed > 10 or state.step == total:
            first_step = first_step or state.step
            done, left = state.step - first_step, total - state.step
            eta = f"{(now - begun) / done * left:.0f} s left" if done else "…"
            console.print(f"step {state.step}/{total}  {losses}  {eta}")
            printed = now

    with bar:
        yield show


def _report(state: Any) -> int:
    """Say what a run left behind, and how to go on with one that was stopped.

    Args:
        state: a `TrainingState`, whose module is imported only once a run has begun.
    """
    from selfalign.runs.folder import read_record
    from selfalign.training.tracking import FOR_CURVES, read_metrics

    stopped = state.step < state.config.training.steps
    code = 128 + (state.stopped_by or 0) if stopped else 0
    if not state.accelerator.is_main_process:
        return code
    folder = state.folder
    if stopped:
        console.print(
            f"stopped after step {state.step} of {state.config.training.steps}; checkpoint written. "
            f"Go on with: selfalign train --resume {folder}"
        )
        return code
    config = read_record(folder).config
    metrics = read_metrics(folder, FOR_CURVES)
    last = next((line for line in reversed(metrics) if "loss" in line), None)
    heldout = next((line for line in reversed(metrics) if "heldout_ema" in line), None)
    parameters = sum(p.numel() for p in state.student.parameters())
    table = Table(show_header=False, box=None)
    backbone = config.model.backbone
    model = f"SiT {config.model.size}" if backbone == "sit" else backbone
    table.add_row("model", f"{model}, {parameters:,} parameters")
    table.add_row("data", f"{config.data.name}, {len(state.source.train):,} training images")
    table.add_row("steps", f"{state.step:,} of batch {config.training.batch_size}")
    if last is not None:
        table.add_row("training loss", f"{last['loss']:.4f}")
    if heldout is not None:
        table.add_row("held-out denoising loss, EMA", f"{heldout['heldout_ema']:.4f}")
        table.add_row("held-out denoising loss, raw", f"{heldout['heldout_raw']:.4f}")
    table.add_row("samples", str(folder / "samples" / f"step_{state.step:08d}.png"))
    table.add_row("curves", str(folder / "curves.png"))
    table.add_row("go on", f"selfalign sample {folder} --out {folder}/generated")
    console.print(table)
    return 0

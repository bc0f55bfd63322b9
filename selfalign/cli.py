"""The command line: parses, calls, prints. The only module that speaks to a person or exits."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from selfalign.config import RunConfig
from selfalign.data.latents import PrepareConfig, prepare, verify
from selfalign.errors import UserError
from selfalign.recipes import RECIPES, recipe
from selfalign.run import (
    class_names,
    load_run,
    read_config,
    resume_run,
    sampling_record,
    start_run,
)
from selfalign.sampling.generate import SamplingConfig, check_sampling, generate, to_uint8
from selfalign.sampling.pictures import MAX_COLUMNS, draw_grids
from selfalign.training.loop import TrainingState
from selfalign.training.tracking import read_metrics

console = Console(highlight=False, soft_wrap=True)
T = TypeVar("T")


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


@dataclass(frozen=True)
class ResumeArguments:
    """Go on with a run from its last checkpoint."""

    resume: Path
    """Folder of the run."""
    training: ResumedTraining


@dataclass(frozen=True)
class SampleArguments:
    """Sample from a run: writes samples.npz (arr_0 uint8 NHWC, arr_1 labels), grid.png and
    sampling.json."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path
    """Folder for the samples."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")]
    num: int = 100
    """How many samples."""
    labels: tuple[int, ...] | None = None
    """Classes, repeated in order over the samples; left out: drawn at random."""
    batch_size: int = 100
    """Samples at once; has no effect on the samples."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights to sample from."""


@dataclass(frozen=True)
class PrepareArguments:
    """Prepare a data set."""

    source: Annotated[str, tyro.conf.Positional]
    """Class folders of images; a .tar, .parquet or .arrow file or a folder of them; a folder with
    dataset.json (vae-sd); torchvision:NAME[:FOLDER]; or hub:OWNER/NAME[:SPLIT]."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder for the result."""
    settings: Annotated[PrepareConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class VerifyArguments:
    """Check a prepared data set."""

    verify: Path
    """Folder of the data set."""


def train_command(arguments: Sequence[str]) -> int:
    """`selfalign train`."""
    usage = (
        "usage: selfalign train RECIPE --out DIR [--SECTION.FIELD VALUE …]\n"
        "       selfalign train --resume DIR [--training.steps N]\n\n"
        f"recipes: {', '.join(RECIPES)}\n"
        "every setting of a recipe: selfalign train RECIPE --help\n"
        "example: selfalign train sra-dts-as --out runs/digits --data.name digits "
        "--model.size tiny --training.steps 1000"
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(usage)
        return 0
    if not arguments[0].startswith("-"):
        base = recipe(arguments[0])
        parsed = _parse(
            TrainArguments,
            arguments[1:],
            f"selfalign train {arguments[0]}",
            f"{arguments[0]}: {RECIPES[arguments[0]].summary}. Example: selfalign train "
            f"{arguments[0]} --out runs/digits --data.name digits --model.size tiny",
            config=base,
        )
        with _progress() as progress:
            state = start_run(parsed.config, parsed.out, progress)
    else:
        resumed = _parse(
            ResumeArguments,
            arguments,
            "selfalign train",
            "Go on with a run from its last checkpoint. "
            "Example: selfalign train --resume runs/digits --training.steps 2000",
        )
        with _progress() as progress:
            state = resume_run(resumed.resume, resumed.training.steps, progress)
    return _report(state)


def sample_command(arguments: Sequence[str]) -> int:
    """`selfalign sample`."""
    parsed = _parse(
        SampleArguments,
        arguments,
        "selfalign sample",
        "Sample from a run: writes samples.npz (arr_0 uint8 NHWC, arr_1 labels), grid.png and "
        "sampling.json. Example: selfalign sample runs/digits --out runs/digits/generated --num 100 "
        "--solver sde --steps 250 --guidance-scale 1.8 --guidance-interval 0 0.7",
    )
    for name, value in (("num", parsed.num), ("batch-size", parsed.batch_size)):
        if value < 1:
            raise UserError(f"--{name} is {value}: allowed is a number from 1")
    device = Accelerator().device
    run = load_run(parsed.run, parsed.weights, device)
    sampling, labels = parsed.sampling, parsed.labels
    check_sampling(run.model, sampling, run.config.views.class_dropout, labels)
    images, chosen = [], []
    bar = _bar("sampling")
    with bar:
        task = bar.add_task("", total=parsed.num)
        batches = generate(
            run.model,
            run.config.flow.path,
            sampling,
            parsed.num,
            batch_size=parsed.batch_size,
            labels=labels,
            separate=run.config.views.attention == "separated",
        )
        for batch in batches:
            images.append(to_uint8(batch.images).cpu())
            chosen.append(batch.labels)
            bar.update(task, advance=len(batch.indices))
    arr_0 = np.concatenate([part.permute(0, 2, 3, 1).numpy() for part in images])
    arr_1 = np.concatenate([part.numpy() for part in chosen])
    record = sampling_record(run, sampling, weights=parsed.weights, num=parsed.num, labels=labels)
    names = class_names(parsed.run) if run.model.num_classes else ()
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
        partial = parsed.out / ".samples.partial.npz"
        np.savez(partial, arr_0=arr_0, arr_1=arr_1)
        partial.replace(parsed.out / "samples.npz")
        (parsed.out / "sampling.json").write_text(json.dumps(record, indent=2) + "\n")
        _draw_samples(parsed.out / "grid.png", arr_0, arr_1, names)
    except OSError as error:
        raise UserError(f"--out is {str(parsed.out)!r}: cannot be written ({error})") from error
    console.print(
        f"{parsed.num} samples from step {run.step} ({parsed.weights} weights): "
        f"{parsed.out / 'samples.npz'}, {parsed.out / 'grid.png'}"
    )
    return 0


def prepare_command(arguments: Sequence[str]) -> int:
    """`selfalign prepare`."""
    if "--verify" in arguments:
        return _verify(arguments)
    parsed = _parse(
        PrepareArguments,
        arguments,
        "selfalign prepare",
        "Encode images once, into a few large files that training reads fast. The same command "
        "continues what was interrupted; selfalign prepare --verify OUT checks the result. "
        "Example: selfalign prepare imagenet/train data/imagenet256 --vae ema --processes 8",
    )
    with _bar("preparing") as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            if bar.tasks[task].total is None:
                bar.reset(task, completed=done, total=total)  # what was finished before is no speed
            bar.update(task, completed=done)

        manifest = prepare(parsed.source, parsed.out, parsed.settings, show)
    images = sum(shard.records for shard in manifest.shards)
    size = images * manifest.layout.record_bytes
    classes = len(manifest.layout.class_names)
    console.print(
        f"{images:,} images, {classes or 'no'} classes, as {manifest.layout.kind} in "
        f"{len(manifest.shards)} files of together {size / 1e9:,.2f} GB: {parsed.out}"
    )
    if manifest.skipped:
        listed = ", ".join(manifest.skipped[:10]) + (", …" if len(manifest.skipped) > 10 else "")
        console.print(
            f"left out as unreadable: {len(manifest.skipped):,} ({listed}); all are listed in "
            f"{parsed.out / 'manifest.json'}"
        )
    console.print(
        f"train on it: selfalign train RECIPE --out DIR --data.name latents --data.root {parsed.out}"
    )
    return 0


def _verify(arguments: Sequence[str]) -> int:
    parsed = _parse(
        VerifyArguments,
        arguments,
        "selfalign prepare",
        "Compare a prepared data set with its checksums. "
        "Example: selfalign prepare --verify data/imagenet256",
    )
    with _bar("verifying", DownloadColumn()) as bar:
        task = bar.add_task("", total=None)
        problems = verify(
            parsed.verify, lambda done, total: bar.update(task, completed=done, total=total)
        )
    if problems:
        found = "; ".join(f"{file} {problem}" for file, problem in problems.items())
        raise UserError(f"{parsed.verify}: {found}")
    console.print(f"{parsed.verify}: every checksum is right")
    return 0


def recipes_command(arguments: Sequence[str]) -> int:
    """`selfalign recipes`."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise UserError(f"selfalign recipes takes no arguments, got {arguments[0]!r}")
    table = Table("recipe", "what sets it apart", "settings that differ from sit", box=None)
    for name, entry in RECIPES.items():
        settings = ", ".join(f"{key} {value}" for key, value in entry.settings.items())
        table.add_row(name, entry.summary, settings or "–")
    console.print(table)
    console.print(
        "train one: selfalign train RECIPE --out DIR; settings: selfalign train RECIPE --help"
    )
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train_command, "train a recipe, or go on with a run"),
    "sample": (sample_command, "sample from a run"),
    "prepare": (prepare_command, "encode a data set once, into files that training reads fast"),
    "recipes": (recipes_command, "list the recipes and what sets them apart"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for what a person got wrong, 128+n for signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            console.print("usage: selfalign COMMAND …\n")
            for name, (_, summary) in COMMANDS.items():
                console.print(f"  {name:10} {summary}")
            console.print("\nwhat a command takes: selfalign COMMAND --help")
            return 0
        if arguments[0] not in COMMANDS:
            raise UserError(f"command is {arguments[0]!r}: allowed are {', '.join(COMMANDS)}")
        return COMMANDS[arguments[0]][0](arguments[1:])
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"selfalign: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("selfalign: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parse(
    arguments_class: type[T],
    arguments: Sequence[str],
    program: str,
    description: str,
    **defaults: Any,
) -> T:
    """Parse with tyro, turning its boxed messages into one line.

    Args:
        arguments_class: a dataclass; its fields become options.
        arguments: the words after the command.
        program: the command, as its help shows it.
        description: stands above the options in the help, with an example.
        defaults: values of fields that differ from the class's own.
    """
    names = [field.name for field in dataclasses.fields(arguments_class)]  # type: ignore[arg-type]
    default: Any = tyro.MISSING_NONPROP
    if defaults:
        default = arguments_class(**{name: defaults.get(name, tyro.MISSING) for name in names})
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                arguments_class,
                args=list(arguments),
                prog=program,
                description=description,
                default=default,
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(f"{_one_line(said.getvalue())} (see {program} --help)") from None


def _one_line(message: str) -> str:
    """The first sentence of a boxed message, without its frame and title."""
    lines = [line.strip(" │╭╮╰╯─\t") for line in message.splitlines()]
    said = [line for line in lines if line.strip("-")]
    ends = ("Argument helptext", "For full helptext", "Arguments similar", "Perhaps you meant")
    kept = []
    for line in said[1:]:
        if line.startswith(ends):
            break
        kept.append(line)
    return " ".join(kept or said)


def _bar(name: str, counts: ProgressColumn | None = None) -> Progress:
    """A bar with counts, the time it took and the time left."""
    return Progress(
        TextColumn(name),
        BarColumn(),
        counts or MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[TrainingState, dict[str, float]], None]]:
    """A live bar on a terminal, a line now and then elsewhere; the main process only."""
    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        disable=not console.is_terminal or os.environ.get("LOCAL_RANK", "0") != "0",
    )
    task: Any = None
    begun, first_step, printed = time.perf_counter(), 0, 0.0

    def show(state: TrainingState, values: dict[str, float]) -> None:
        nonlocal task, first_step, printed
        if not state.accelerator.is_main_process:
            return
        total = state.config.training.steps
        losses = f"loss {values['loss']:.4f} (denoising {values['denoising_loss']:.4f}"
        if state.config.alignment.target != "none":
            losses += f", alignment {values['alignment_loss']:.4f}"
        losses += f") {values['samples_per_second']:.0f} samples/s"
        now = time.perf_counter()
        if not bar.disable:
            if task is None:
                task = bar.add_task("", total=total, losses="", completed=state.step)
            bar.update(task, completed=state.step, losses=losses)
        elif now - printed > 10 or state.step == total:
            first_step = first_step or state.step
            done, left = state.step - first_step, total - state.step
            eta = f"{(now - begun) / done * left:.0f} s left" if done else "…"
            console.print(f"step {state.step}/{total}  {losses}  {eta}")
            printed = now

    with bar:
        yield show


def _report(state: TrainingState) -> int:
    """Say what a run left behind, and how to go on with one that was stopped."""
    if not state.accelerator.is_main_process:
        return 0
    folder = state.folder
    if state.step < state.config.training.steps:
        console.print(
            f"stopped after step {state.step} of {state.config.training.steps}; checkpoint written. "
            f"Go on with: selfalign train --resume {folder}"
        )
        return 128 + (state.stopped_by or 0)
    config, _ = read_config(folder)
    metrics = read_metrics(folder)
    last = next((line for line in reversed(metrics) if "loss" in line), None)
    heldout = next((line for line in reversed(metrics) if "heldout_ema" in line), None)
    parameters = sum(p.numel() for p in state.student.parameters())
    table = Table(show_header=False, box=None)
    table.add_row("model", f"SiT {config.model.size}, {parameters:,} parameters")
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


def _draw_samples(path: Path, images: Any, labels: Any, names: Sequence[str]) -> None:
    """A grid of up to 100 samples: a class per column if every class that occurs fits, else as numbered."""
    import torch

    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    classes = sorted(set(labels.tolist())) if names else []
    if 1 < len(classes) <= MAX_COLUMNS:
        by_class = [np.flatnonzero(labels == k)[:MAX_COLUMNS] for k in classes]
        rows = min(map(len, by_class))
        order = [int(column[row]) for row in range(rows) for column in by_class]
        draw_grids(
            path, {"": tensors[order]}, [names[k] for k in classes], f"{len(images)} samples"
        )
    else:
        columns = min(MAX_COLUMNS, len(images))
        count = min(len(images) // columns, MAX_COLUMNS) * columns
        draw_grids(path, {"": tensors[:count]}, [""] * columns, f"{len(images)} samples")


if __name__ == "__main__":
    sys.exit(main())

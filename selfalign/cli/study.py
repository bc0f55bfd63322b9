"""`selfalign study`."""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from selfalign import parts
from selfalign.cli.console import console, parse
from selfalign.cli.tree import options_of, restore
from selfalign.config import RunConfig, override
from selfalign.errors import UserError
from selfalign.parts import chosen
from selfalign.sections import PATCH_SIZES, DataConfig, FlowConfig, TrainingConfig
from selfalign.study.grid import Grid
from selfalign.study.grid_file import load_grid
from selfalign.study.grids import GRIDS
from selfalign.study.profiles import PROFILES, Profile
from selfalign.study.settings import MAX_SEEDS, LaunchConfig, Measurement

if TYPE_CHECKING:  # these import torch, which printing help does not need
    from selfalign.study.launch import Status


ENCODERS = ("targets.frozen-encoder.encoders", "targets.encoder-attention.encoder")
"""What `--encoders` sets: all of them, and the first."""


@dataclass(frozen=True)
class StudyData:
    """The data set; with several train fractions, the whole grid is run on each."""

    name: str = chosen("source", "digits")
    """Which data set, as for `selfalign train`."""
    root: str = DataConfig.root
    """Folder that holds the files."""
    image_size: int = DataConfig.image_size
    """Side of the square that a folder's images are cropped and resized to."""
    train_fraction: tuple[float, ...] = (1.0,)
    """Shares of the training images, as in 0.125 0.25 0.5 1."""
    flip: bool = DataConfig.flip
    """Mirror training images at random."""
    workers: int = DataConfig.workers
    """Processes of each run that read the data."""


@dataclass(frozen=True)
class StudyModel:
    """The transformer of all runs."""

    size: str | None = None
    """Size and patch; left out: tiny, with as many tokens as the profile allows."""
    qk_norm: bool = False
    """Normalise queries and keys per head."""


@dataclass(frozen=True)
class StudyArguments:
    """Run a grid of variants × seeds and report on it."""

    out: Path
    """Folder of the study: new, or that of the same study, which then goes on."""
    profile: Literal["smoke", "laptop", "full"] = "laptop"
    """Budget from which the settings below take their defaults."""
    seeds: int = 3
    """How many seeds; variants are compared within each."""
    encoders: tuple[str, ...] | None = None
    """Networks that the named grids' variants with frozen encoders are aligned with, as in
    timm:vit_small_patch16_224; left out: the profile's, in full DINOv2."""
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)
    data: StudyData = field(default_factory=StudyData)
    model: StudyModel = field(default_factory=StudyModel)
    flow: FlowConfig = field(default_factory=FlowConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    measurement: Measurement = field(default_factory=Measurement)


@dataclass(frozen=True)
class PowerArguments:
    """What a study can find, before it runs."""

    like: Path
    """Folder of an earlier study with a report.json: its spread over seeds is taken for the new one's."""
    seeds: int = 3
    """How many seeds are planned."""


def study_command(arguments: Sequence[str]) -> int:
    """`selfalign study`."""
    usage = (
        "usage: selfalign study NAME|GRID.yaml|GRID.py --out DIR [--profile smoke|laptop|full]\n"
        "       selfalign study power NAME|GRID --like DIR [--seeds N]\n"
        "       selfalign study report DIR\n\n"
        "Runs every variant of a grid with several seeds, and writes DIR/report.html. Stopped, it goes "
        "on with the same command. power says beforehand what so many seeds can find.\n"
        "every setting: selfalign study paper --help\n"
        "example: selfalign study paper --data.name digits --profile laptop --out studies/digits\n\n"
        f"grids: {', '.join(GRIDS)}\n"
        "profiles: "
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        listed = "; ".join(f"{name}, {entry.summary}" for name, entry in PROFILES.items())
        console.print(usage + listed, markup=False)
        return 0
    if arguments[0].startswith("-"):
        raise UserError(
            f"the grid comes first, not {arguments[0]}: selfalign study paper --out DIR"
        )
    if arguments[0] == "report":
        return _report(arguments[1:])
    if arguments[0] == "power":
        return _power(arguments[1:])
    return _run(arguments)


def _grid(name: str) -> tuple[Grid, int | None]:
    """A grid and how many seeds it should have, where it says."""
    return GRIDS[name] if name in GRIDS else (load_grid(Path(name)), None)


def _run(arguments: Sequence[str]) -> int:
    grid, seeds = _grid(arguments[0])
    profile = _profile(arguments)
    parsed = parse(
        StudyArguments,
        arguments[1:],
        f"selfalign study {arguments[0]}",
        "Run a grid of variants and seeds, and report on it. Example: selfalign study paper "
        "--data.name digits --profile laptop --out studies/digits",
        **_defaults(profile, seeds if profile != "smoke" else None),
    )
    if arguments[0] in GRIDS:
        grid = grid.with_parts(_parts(parsed))
    if parsed.encoders:
        settable = {name for variant in grid.variants.values() for name in variant.settings}
        if arguments[0] not in GRIDS or not settable & set(ENCODERS):
            raise UserError(
                f"--encoders are {', '.join(parsed.encoders)}: {arguments[0]} has no variant that takes them "
                "from the command line"
            )
    measurement = restore(parsed.measurement, PROFILES[profile].measurement)
    if not 1 <= parsed.seeds <= MAX_SEEDS:
        raise UserError(f"--seeds is {parsed.seeds}: allowed is a number from 1 to {MAX_SEEDS:,}")
    from selfalign.study.launch import launch, require_launcher
    from selfalign.study.plan import Study, read_study, write_study
    from selfalign.study.report import write_report
    from selfalign.study.reuse import take_over
    from selfalign.study.verdicts import register

    study = Study(
        grid=grid,
        settings=_settings(parsed, PROFILES[parsed.profile]),
        seeds=tuple(range(parsed.seeds)),
        train_fractions=parsed.data.train_fraction,
        measurement=measurement,
        profile=parsed.profile,
        registration=register(
            grid,
            measurement.distance(parts.get("source", parsed.data.name, "data.name").small),
            parsed.seeds,
        ),
    )
    study.check()
    require_launcher(parsed.out, parsed.launch)
    others = [read_study(folder) for folder in parsed.launch.reuse]
    study = write_study(parsed.out, study)
    if study.registration is not None:
        for effect, size in study.registration.detectable.items():
            console.print(
                f"smallest detectable effect, {effect}: {size:.2f} times the spread of runs over seeds",
                markup=False,
            )
    for folder, other in zip(parsed.launch.reuse, others, strict=True):
        taken = take_over(parsed.out, study, folder, other)
        console.print(f"{len(taken)} finished runs of {folder} are taken over", markup=False)
    with _overview() as show:
        for status in launch(parsed.out, parsed.launch):
            show(status)
    report = write_report(parsed.out)
    console.print(f"{status.done} of {status.total} runs done: {report}", markup=False)
    for name in status.failed:
        console.print(f"failed: {name} (why: {parsed.out / 'runs' / name}.log)", markup=False)
    return 1 if status.failed else 0


def _power(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise UserError("the grid comes first: selfalign study power 2x2 --like DIR --seeds 10")
    grid, seeds = _grid(arguments[0])
    parsed = parse(
        PowerArguments,
        arguments[1:],
        f"selfalign study power {arguments[0]}",
        "What a study can find, before it runs. Example: selfalign study power 2x2 --like "
        "docs/results/digits --seeds 10",
        seeds=seeds or PowerArguments.seeds,
    )
    if not 2 <= parsed.seeds <= MAX_SEEDS:
        raise UserError(f"--seeds is {parsed.seeds}: allowed is a number from 2 to {MAX_SEEDS:,}")
    from selfalign.pages.numbers import number, share
    from selfalign.study.power import power, read_pilot
    from selfalign.study.results import DISTANCES, METRICS
    from selfalign.study.verdicts import register

    pilot = read_pilot(parsed.like)
    distance = next((name for name in DISTANCES if name in pilot.layouts), DISTANCES[0])
    registration = register(grid, distance, parsed.seeds)
    if registration is None:
        raise UserError(f"grid {grid.name} makes no claim that could be tested")
    table = Table(box=None, pad_edge=False)
    for heading in (
        "effect",
        "metric",
        "smallest detectable",
        "margin",
        "chance to show that none",
    ):
        table.add_column(heading)
    for row in power(grid, registration, pilot, parsed.seeds):
        table.add_row(
            Text(row.effect),
            METRICS[row.metric].title,
            f"{number(row.detectable, 2)} ({share(row.detectable, row.level)})",
            "unknown"
            if row.margin is None
            else f"{number(row.margin, 2)} ({share(row.margin, row.level)})",
            "–" if row.chance is None else f"{100 * row.chance:.0f} %",
        )
    console.print(table)
    console.print(
        f"{parsed.seeds} seeds of {len(grid.variants)} variants; found with a chance of 80 % at a level of "
        f"5 % over {len(registration.effects) * len(registration.metrics)} tests, if runs spread as in "
        f"{parsed.like}",
        markup=False,
    )
    return 0


def _report(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("selfalign study report takes the folder of a study")
    from selfalign.study.report import write_report

    console.print(str(write_report(Path(arguments[0]))), markup=False)
    return 0


def _profile(arguments: Sequence[str]) -> str:
    """The profile among the arguments, whose settings are the other options' defaults."""
    scan = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    scan.add_argument("--profile", default="laptop")
    try:
        found = scan.parse_known_args(list(arguments))[0].profile
    except argparse.ArgumentError:
        found = "laptop"  # what is wrong with the option, the real parser says
    return found if found in PROFILES else "laptop"


def _defaults(name: str, seeds: int | None) -> dict[str, Any]:
    profile = PROFILES[name]
    base = override(RunConfig(), profile.settings)
    return {
        "profile": name,
        "seeds": seeds or profile.seeds,
        "launch": LaunchConfig(),
        "data": options_of(
            StudyData(
                base.data.name,
                base.data.root,
                base.data.image_size,
                (1.0,),
                base.data.flip,
                base.data.workers,
            )
        ),
        "model": StudyModel(profile.settings.get("model.size"), base.model.qk_norm),
        "flow": base.flow,
        "training": options_of(base.training),
        "measurement": options_of(profile.measurement),
    }


def _settings(parsed: StudyArguments, profile: Profile) -> Mapping[str, Any]:
    """What all runs share, by dotted name: the profile's settings, and the command line's over them."""
    settings = dict(profile.settings)
    for section, values in asdict(parsed).items():
        if section in ("data", "flow", "model", "training"):
            settings.update({f"{section}.{name}": value for name, value in values.items()})
    del settings["data.train_fraction"]
    if parsed.model.size is None:
        settings["model.size"] = _smallest_patch(settings, profile)
    return settings


def _parts(parsed: StudyArguments) -> Mapping[str, Any]:
    """Settings of parts that the profile has for named grids, and the command line's encoders over them."""
    parts = dict(PROFILES[parsed.profile].parts)
    if parsed.encoders:
        parts |= zip(ENCODERS, (parsed.encoders, parsed.encoders[0]), strict=True)
    return parts


def _smallest_patch(settings: Mapping[str, Any], profile: Profile) -> str:
    names = {name: value for name, value in settings.items() if name.startswith("data.")}
    from selfalign.data.datasets import open_data

    height, width = open_data(override(RunConfig(), names).data).image_size
    for patch in PATCH_SIZES:
        fits = height % patch == width % patch == 0
        if fits and height * width <= (profile.max_tokens or 0) * patch**2:
            return f"tiny/{patch}"
    raise UserError(
        f"--model.size is left out: no patch cuts {height}×{width} into at most {profile.max_tokens} "
        "tokens; give a size, as in tiny/8"
    )


@contextmanager
def _overview() -> Iterator[Any]:
    """A live table on a terminal, a line now and then elsewhere."""
    begun, printed = time.perf_counter(), 0.0

    def left(status: "Status") -> str:
        rest = status.total - status.done - len(status.failed)
        rest_of_running = sum(step / steps for step, steps in status.running.values())
        if status.finished < 0.05:
            return "…"
        seconds = (time.perf_counter() - begun) / status.finished * max(0.0, rest - rest_of_running)
        return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"

    def summary(status: "Status") -> str:
        waiting = status.total - status.done - len(status.failed) - len(status.running)
        return (
            f"{status.done} of {status.total} runs done, {len(status.running)} running, "
            f"{waiting} waiting, {len(status.failed)} failed, {left(status)} left"
        )

    def table(status: "Status") -> Table:
        grid = Table(box=None, show_header=False)
        grid.add_row(summary(status), ProgressBar(status.total, status.done, width=24))
        for name, (step, steps) in status.running.items():
            grid.add_row(Text(f"  {name}"), ProgressBar(steps, step, width=24), f"{step}/{steps}")
        for name in status.failed:
            grid.add_row(Text(f"  {name}"), "failed")
        return grid

    with Live(console=console, transient=True) as live:

        def show(status: "Status") -> None:
            nonlocal printed
            if console.is_terminal:
                live.update(table(status))
            elif time.perf_counter() - printed > 30:
                console.print(summary(status))
                printed = time.perf_counter()

        yield show

"""`selfalign prepare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import DownloadColumn

from selfalign.cli.console import console, make_bar, parse
from selfalign.data.latents.settings import PrepareConfig
from selfalign.errors import UserError
from selfalign.sections import DataConfig


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


def prepare_command(arguments: Sequence[str]) -> int:
    """`selfalign prepare`."""
    if "--verify" in arguments:
        return _verify(arguments)
    parsed = parse(
        PrepareArguments,
        arguments,
        "selfalign prepare",
        "Encode images once, into a few large files that training reads fast. The same command "
        "continues what was interrupted; selfalign prepare --verify OUT checks the result. "
        "Example: selfalign prepare imagenet/train data/imagenet256 --vae ema --processes 8",
    )
    from selfalign.data.datasets import open_data
    from selfalign.data.latents.prepare import prepare
    from selfalign.weights import listed

    with make_bar("preparing") as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            if bar.tasks[task].total is None:
                bar.reset(task, completed=done, total=total)  # what was finished before is no speed
            bar.update(task, completed=done)

        manifest = prepare(parsed.source, parsed.out, parsed.settings, show)
    size = manifest.records * manifest.layout.record_bytes
    classes = len(manifest.layout.class_names)
    say(
        f"{manifest.records:,} images, {classes or 'no'} classes, as {manifest.layout.kind} in "
        f"{len(manifest.shards)} files of together {size / 1e9:,.2f} GB: {parsed.out}"
    )
    prepared = open_data(DataConfig(name="latents", root=str(parsed.out)))
    for line in prepared.summary.lines():
        say(line)
    if manifest.skipped:
        say(
            f"left out as unreadable: {len(manifest.skipped):,} ({listed(manifest.skipped, 10)}); all "
            f"are listed in {parsed.out / 'manifest.json'}"
        )
    say(
        f"train on it: selfalign train RECIPE --out DIR --data.name latents --data.root {parsed.out}"
    )
    return 0


def say(line: str) -> None:
    """Print a line as it is: names may look like the console's markup."""
    console.print(line, markup=False)


def _verify(arguments: Sequence[str]) -> int:
    parsed = parse(
        VerifyArguments,
        arguments,
        "selfalign prepare",
        "Compare a prepared data set with its checksums. "
        "Example: selfalign prepare --verify data/imagenet256",
    )
    from selfalign.data.latents.verify import verify

    with make_bar("verifying", DownloadColumn()) as bar:
        task = bar.add_task("", total=None)
        problems = verify(
            parsed.verify, lambda done, total: bar.update(task, completed=done, total=total)
        )
    if problems:
        found = "; ".join(f"{file} {problem}" for file, problem in problems.items())
        raise UserError(f"{parsed.verify}: {found}")
    say(f"{parsed.verify}: every checksum is right")
    return 0

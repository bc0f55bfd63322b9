"""What all commands share: parsing into one-line errors, the console, a progress bar."""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from selfalign.errors import UserError

console = Console(highlight=False, soft_wrap=True)
T = TypeVar("T")


def parse(
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


def make_bar(name: str, counts: ProgressColumn | None = None, disable: bool = False) -> Progress:
    """A bar with counts, the time it took and the time left."""
    return Progress(
        TextColumn(name),
        BarColumn(),
        counts or MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )

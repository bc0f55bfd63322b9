"""What all commands share: parsing into one-line errors, the console, a progress bar."""

import contextlib
import dataclasses
import gc
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
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

from selfalign.environment import is_first_process
from selfalign.errors import UserError


class _Console(Console):
    """Prints text as it is; a reader that has gone, or a full disk, ends the output and not the work."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """See `Console.print`."""
        try:
            super().print(*objects, **settings)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        """See `Console.on_broken_pipe`, which exits."""
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shows_bars() -> bool:
    """Whether a bar can be drawn and redrawn here: on a terminal, or in a notebook that has widgets."""
    if not is_first_process():
        return False  # it shows what all do
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


# Names of files may look like markup.
console = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
T = TypeVar("T")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch and what needs it.

    They make very many objects and no garbage: not looking for any meanwhile saves a sixth of their time, and
    no later search has to walk them. Nothing where torch is there already.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@dataclass(frozen=True)
class MovedData:
    """Where the data is."""

    root: str | None = None
    """Folder of the data, if it has moved; left out: where it was. It must be the same data."""


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
    for before, word in zip((program, *arguments), arguments, strict=False):
        if not word:  # as of a shell's variable that is not set; a path would be the current folder
            raise UserError(f"after {before} stands an empty word: allowed is a value")
    fields = dataclasses.fields(arguments_class)  # type: ignore[arg-type]
    given = {entry.name: defaults.get(entry.name, _own_default(entry)) for entry in fields}
    default: Any = arguments_class(**given) if defaults else tyro.MISSING_NONPROP
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


def _own_default(entry: "dataclasses.Field[Any]") -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return tyro.MISSING if entry.default is dataclasses.MISSING else entry.default


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
        TextColumn(name, markup=False),
        BarColumn(),
        counts or MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=disable or (console.is_jupyter and not shows_bars()),
    )

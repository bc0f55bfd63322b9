"""Files of JSON, read once into checked types.

Whatever a file says is checked here, at the border: the rest of the package sees values of the types
that it asked for. Records are `msgspec.Struct`s; their annotations say what is allowed.
"""

import contextlib
import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from selfalign.disk import write_whole
from selfalign.errors import UserError

MAX_BYTES = 2**28
"""Records are small; a file beyond this is not one of ours, and is not read into memory."""
T = TypeVar("T")


def read_json(path: Path, type_: type[T], limit: int = MAX_BYTES) -> T:
    """A file of JSON as a value of a type that msgspec knows.

    Args:
        path: the file.
        type_: a `msgspec.Struct`, a dataclass, or a type of plain values.
        limit: bytes that it may have.

    Raises:
        UserError: the file cannot be read, is no JSON, or holds something else; the message names
            the file and the field.
    """
    return convert(read_plain(path, limit=limit), type_, f"{path} cannot be read")


def read_plain(path: Path, finite: bool = True, limit: int = MAX_BYTES) -> Any:
    """A file of JSON as plain values.

    Args:
        path: the file.
        finite: as for `parse_json`.
        limit: bytes that it may have.

    Raises:
        UserError: the file cannot be read, or is no JSON; the message names it.
    """
    content = read_bytes(path, limit)
    try:
        return parse_json(content, finite)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: it is no JSON ({error})") from error


def convert(values: object, type_: type[T], where: object) -> T:
    """Plain values, as JSON and YAML hold them, as a value of a type that msgspec knows.

    Args:
        values: nested dictionaries and lists.
        type_: as for `read_json`.
        where: begins the message.

    Raises:
        UserError: they hold something else; the message names the field.
    """
    try:
        return msgspec.convert(values, type_, str_keys=True)
    except (msgspec.ValidationError, ValueError) as error:
        raise UserError(f"{where}: {_with_field(str(error))}") from error


def parse_json(content: bytes, finite: bool = True) -> Any:
    """JSON as plain values.

    Not by msgspec, which refuses names of files that are no UTF-8 (lone surrogates), as class names
    may hold them.

    Args:
        content: the text.
        finite: whether NaN and infinity are refused. Results of runs that diverged hold them.

    Raises:
        ValueError: this is no JSON; also where it is nested too deep.
    """
    try:
        parse = _finite if finite else float
        return json.loads(content, parse_constant=parse, parse_float=parse)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        UserError: there is no such file, it is something else (a folder, a pipe, a device), is larger,
            or cannot be read.
    """
    with open_file(path, limit) as file:
        return file.read()


@contextlib.contextmanager
def open_file(path: Path, limit: int) -> Iterator[IO[bytes]]:
    """A regular file of at most `limit` bytes, open for reading. Raises UserError as `read_bytes` does."""
    try:
        status = path.stat()  # before it is opened: a pipe would wait for a writer
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} cannot be read: it is not a file")
        if status.st_size > limit:
            raise UserError(
                f"{path} cannot be read: it has {status.st_size:,} bytes; allowed are {limit:,}"
            )
        with path.open("rb") as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"{path} cannot be read: {reason}") from error


def write_json(path: Path, record: Any) -> None:
    """Write a record as `read_json` reads it, whole or not at all.

    Raises:
        UserError: the disk is full or not writable.
    """
    text = json.dumps(msgspec.to_builtins(record), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not allowed")
    return number


def _with_field(message: str) -> str:
    """msgspec's message with the field in front, named as it is written in the file."""
    found = re.fullmatch(r"(.*) - at `(\S+)`", message, re.DOTALL)
    if found is None:
        return message
    return f"{found[2].removeprefix('$').removeprefix('.')}: {found[1]}"

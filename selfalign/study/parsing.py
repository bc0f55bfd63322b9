"""What files of a study hold becomes a checked type, in which no unknown field is passed over."""

import math
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from selfalign.errors import UserError
from selfalign.records import convert

T = TypeVar("T")
LARGEST = 1e100
"""Far beyond anything that is measured; the square of a larger number may be none."""


def checked(values: object, kind: type[T], where: object) -> T:
    """Nested dictionaries and lists as a dataclass.

    Args:
        values: as JSON or YAML hold them.
        kind: the dataclass, of which fields with a default may be missing.
        where: the file, and what in it; begins the message.

    Raises:
        UserError: a field is missing, unknown, or of another type.
    """
    try:
        found = convert(values, kind, where)
        unknown = _unknown(values, msgspec.to_builtins(found), "")
    except UserError as error:
        line = str(error)
        raise UserError(line if line.startswith(str(where)) else f"{where}: {line}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    if unknown:
        raise UserError(f"{where}: there is no field {unknown!r}")
    return found


def require_measurable(values: Iterable[float], name: str, where: object) -> None:
    """Refuse numbers that nothing can have measured; runs that diverged hold NaN and infinity.

    Raises:
        UserError: one is beyond `LARGEST`.
    """
    for value in values:
        if math.isfinite(value) and abs(value) > LARGEST:
            raise UserError(
                f"{where} cannot be read: {name} is {value:g}; allowed are numbers up to {LARGEST:g}"
            )


def _unknown(given: object, known: object, place: str) -> str:
    """The first field that was given and is not known, with the fields around it."""
    if isinstance(given, dict) and isinstance(known, dict):
        for name, value in given.items():
            if name not in known:
                return f"{place}{name}"
            if found := _unknown(value, known[name], f"{place}{name}."):
                return found
    elif isinstance(given, list) and isinstance(known, list | tuple):
        for index, (value, other) in enumerate(zip(given, known, strict=False)):
            if found := _unknown(value, other, f"{place}{index}."):
                return found
    return ""

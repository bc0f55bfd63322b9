"""The border: what files hold becomes a checked type, or one line that names file and field."""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from selfalign.errors import UserError

T = TypeVar("T")


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
        found = msgspec.convert(values, kind)
        if unknown := _unknown(values, msgspec.to_builtins(found), ""):
            raise UserError(f"{where}: there is no field {unknown!r}")
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {str(error).replace('$.', '').replace('`', '')}") from None
    except UserError as error:
        line = str(error)
        raise UserError(line if line.startswith(str(where)) else f"{where}: {line}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    return found


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


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from None

"""`selfalign diff`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from selfalign.cli.console import console, parse
from selfalign.errors import UserError
from selfalign.pages.settings import ABSENT, flatten, shown


@dataclass(frozen=True)
class DiffArguments:
    """Compare the settings of two runs or config files."""

    first: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or a .yaml or .json file of settings."""
    second: Annotated[Path, tyro.conf.Positional]
    """The other one."""


def diff_command(arguments: Sequence[str]) -> int:
    """`selfalign diff`."""
    parsed = parse(
        DiffArguments,
        arguments,
        "selfalign diff",
        "Compare the settings of two runs or config files: prints those that differ. Example: selfalign diff "
        "runs/a runs/b",
    )
    first, second = _settings(parsed.first), _settings(parsed.second)
    table = Table("setting", str(parsed.first), str(parsed.second), box=None)
    names = [
        name
        for name in dict.fromkeys([*first, *second])
        if first.get(name, ABSENT) != second.get(name, ABSENT)
    ]
    for name in names:
        table.add_row(name, first.get(name, ABSENT), second.get(name, ABSENT))
    if names:
        console.print(table)
    else:
        console.print(f"{parsed.first} and {parsed.second} have the same settings")
    return 0


def _settings(place: Path) -> dict[str, str]:
    """All settings of a run or a file, flat and as text; of a run its data and version too."""
    from selfalign.config import config_to_dict
    from selfalign.config_file import read_values, tree_of

    if not place.exists():
        raise UserError(f"{place} does not exist: allowed are a run's folder and a config file")
    path = place / "config.json" if place.is_dir() else place
    if place.is_dir() and not path.is_file():
        raise UserError(f"{str(place)!r} is not a run: it holds no config.json")
    values = read_values(path)
    try:
        flat: dict[str, Any] = flatten(config_to_dict(tree_of(values)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    flat |= {
        name: values[name] for name in ("data_fingerprint", "selfalign_version") if name in values
    }
    return {name: shown(name, value) for name, value in flat.items()}

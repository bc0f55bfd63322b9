"""Grids from files: Python, or YAML in which names are text and numbers are numbers.

A plain word is text wherever the grid wants text, and a number only in `settings` and `paper`.
"""

import importlib.util
from pathlib import Path

from selfalign.errors import UserError
from selfalign.study.grid import Grid, grid_from_dict
from selfalign.yaml_values import read_yaml

_TYPED = ("settings", "paper")
"""Keys below which plain words may be numbers, booleans or nothing; everywhere else they are text."""


def load_grid(path: Path) -> Grid:
    """Read a grid from a Python file that defines `GRID`, or from YAML.

    A Python file is run: read those of other people before you use them.

    Raises:
        UserError: the file is missing, cannot be read, or does not describe a grid.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: allowed are paper, 2x2 and the other names in "
            "`selfalign study --help`, a .py or a .yaml file of a grid"
        )
    if path.suffix == ".py":
        return _from_python(path)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    raise UserError(f"{path} is neither a .py nor a .yaml file")


def _from_python(path: Path) -> Grid:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's file does
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    grid = getattr(module, "GRID", None)
    if not isinstance(grid, Grid):
        raise UserError(f"{path} must define GRID, a selfalign.study.grid.Grid")
    return grid


def _from_yaml(path: Path) -> Grid:
    values = read_yaml(path, "a grid", typed_below=_TYPED)
    if not isinstance(values, dict):
        raise UserError(
            f"{path} is not a grid: needed are keys and values, with variants among them"
        )
    return grid_from_dict({"name": path.stem, **values}, path)

"""Grids from files: Python, or YAML in which names are text and numbers are numbers.

YAML 1.1 takes `1e-3` for text, `on` for True and `12:30` for 750, and forgets the first of two equal keys.
Here a plain word is text wherever the grid wants text, and a number only in `settings` and `paper`.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from selfalign.errors import UserError
from selfalign.records import read_bytes
from selfalign.study.grid import Grid, grid_from_dict

_TYPED = ("settings", "paper")
"""Keys below which plain words may be numbers, booleans or nothing; everywhere else they are text."""
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_NUMBER = re.compile(
    r"[-+]?(\.?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.(inf|nan))", re.IGNORECASE
)
_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")
}
_IMPLICIT = {f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "merge", "value")}
MAX_BYTES = 2**22
"""Of a grid in YAML."""
_LARGEST = 100_000
"""Values in a grid, after its aliases have been followed."""


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
    content = read_bytes(path, MAX_BYTES)
    try:
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
        node = loader.get_single_node()
        values = None if node is None else _Values(loader).of(node, typed=False)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is not a grid: {type(error).__name__}: {line}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} is not a grid: needed are keys and values, with variants among them"
        )
    return grid_from_dict({"name": path.stem, **values}, path)


class _Values:
    """From YAML's nodes to dictionaries, lists, text and numbers."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._left = _LARGEST

    def of(self, node: yaml.Node, typed: bool) -> Any:
        """A node's value; plain words of typed ones may be numbers."""
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {_LARGEST} values, aliases included")
        if node.tag not in _TAGS | _IMPLICIT:
            raise ValueError(f"tag {node.tag!r}{_place(node)}: tags are not allowed")
        if isinstance(node, yaml.MappingNode):
            self._refuse_doubled(node)
            self._loader.flatten_mapping(node)  # merges what `<<` names
            return {key: self.of(value, typed or key in _TYPED) for key, value in self._pairs(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self.of(value, typed) for value in node.value]
        if node.style is not None:  # in quotation marks
            return node.value
        return _word(node.value) if typed else node.value or None

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"a key is no word{_place(key)}")
            yield key.value, value

    def _refuse_doubled(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in self._pairs(node):
            if key in seen:
                raise ValueError(f"the key {key!r} stands twice in one place{_place(node)}")
            seen.add(key)


def _word(text: str) -> Any:
    """A plain word's value."""
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if text.lower() in ("", "~", "null"):
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        is_whole = "." not in text and abs(number) < 2**53 and number.is_integer()
        return int(number) if is_whole else number  # steps: 1e5
    return text


def _place(node: yaml.Node) -> str:
    return f", line {node.start_mark.line + 1}" if node.start_mark else ""

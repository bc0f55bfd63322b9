"""YAML in which names are text and numbers are numbers.

YAML 1.1 takes `1e-3` for text, `on` for True and `12:30` for 750, and forgets the first of two equal keys.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from selfalign.errors import UserError
from selfalign.records import read_bytes

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
"""Of a file."""
_LARGEST = 100_000
"""Values in a file, after its aliases have been followed."""


def read_yaml(path: Path, what: str, typed_below: Collection[str] | None = None) -> Any:
    """A file's dictionaries, lists, text and numbers; None for an empty one.

    Args:
        path: the file.
        what: it should be, for messages.
        typed_below: keys below which plain words may be numbers, booleans or nothing; everywhere else they
            are text. None: everywhere.

    Raises:
        UserError: it cannot be read, or is no YAML of these.
    """
    content = read_bytes(path, MAX_BYTES)
    try:
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
        node = loader.get_single_node()
        values = _Values(loader, typed_below or ())
        return None if node is None else values.of(node, typed=typed_below is None)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is not {what}: {type(error).__name__}: {line}") from None


class _Values:
    """From YAML's nodes to dictionaries, lists, text and numbers."""

    def __init__(self, loader: yaml.SafeLoader, typed_below: Collection[str]) -> None:
        self._loader, self._typed_below = loader, typed_below
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
            return {
                key: self.of(value, typed or key in self._typed_below)
                for key, value in self._pairs(node)
            }
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

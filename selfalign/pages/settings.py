"""Settings side by side: what several runs share, and what sets them apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = "–"
"""What stands for a setting that a run does not have."""


@dataclass(frozen=True)
class Settings:
    """The settings of several runs, by dotted name."""

    shared: Mapping[str, str]
    different: Mapping[str, Mapping[str, str]]
    """By run, what is not the same in all of them."""


def compare(trees: Mapping[str, Mapping[str, Any]]) -> Settings:
    """What is the same in all trees, and what is not.

    Args:
        trees: flat ones by run, from `flatten`.
    """
    names = list(dict.fromkeys(name for tree in trees.values() for name in tree))
    values = {
        name: {
            run: shown(name, tree[name]) if name in tree else ABSENT for run, tree in trees.items()
        }
        for name in names
    }
    same = {name for name in names if len(set(values[name].values())) == 1}
    return Settings(
        shared={name: next(iter(values[name].values())) for name in names if name in same},
        different={
            run: {name: values[name][run] for name in names if name not in same} for run in trees
        },
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dictionaries as one, by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def shown(name: str, value: Any) -> str:
    """A setting as people read it.

    Args:
        name: with its dots; what is left out of the model's settings comes from the data.
        value: as `flatten` gives it.
    """
    if value is None:
        return "from the data" if name.startswith("model.") else "none"
    if isinstance(value, list):
        return " ".join(shown(name, part) for part in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

"""What a study compares: variants, the tables they stand in, and the effects read off them."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from selfalign.errors import UserError
from selfalign.recipes import recipe


@dataclass(frozen=True)
class Variant:
    """One point of the factorial space: a recipe, and the settings that differ from it."""

    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields by dotted name, as in `{"views.mask_ratios": (0.35, 0.65)}`."""

    def __post_init__(self) -> None:
        recipe(self.recipe, self.settings)  # raises on what is unknown or contradicts itself


@dataclass(frozen=True)
class Row:
    """A variant's place in a table."""

    variant: str
    factors: Mapping[str, str] = field(default_factory=dict)
    """What sets the row apart, by column, as in `{"timesteps": "dual", "attention": "full"}`."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's own figures, by column, as in `{"FID 800K": 25.06}`."""


@dataclass(frozen=True)
class Table:
    """Variants that are to be read together."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""
    """What the table is for, and where it stands in the paper."""


@dataclass(frozen=True)
class Effect:
    """A difference of means that answers a question: with minus without, averaged over the contrasts."""

    title: str
    question: str
    """What is asked, as in "Does a second noise level help?"."""
    contrasts: tuple[tuple[str, str], ...]
    """Pairs of variants, (with, without), that differ in one switch."""
    claim: str = ""
    """What the paper says about it; begins with Yes or No where numbers can be held against it."""

    @property
    def expected(self) -> Literal["", "gain", "no gain"]:
        """What the claim foretells, as far as it begins with an answer."""
        if self.claim.startswith("Yes"):
            return "gain"
        return "no gain" if self.claim.startswith("No") else ""


@dataclass(frozen=True)
class Grid:
    """The variants of a study by name, each run once whatever the tables that show it."""

    name: str
    variants: Mapping[str, Variant]
    tables: tuple[Table, ...] = ()
    effects: tuple[Effect, ...] = ()
    baseline: str = ""
    """The variant whose final quality the others are timed to; left out: the first."""

    def __post_init__(self) -> None:
        if not self.variants:
            raise UserError(f"grid {self.name} has no variants: at least one is needed")
        if not self.baseline:
            object.__setattr__(self, "baseline", next(iter(self.variants)))
        used = [("baseline", self.baseline)]
        used += [(f"table {t.title!r}", row.variant) for t in self.tables for row in t.rows]
        used += [(f"effect {e.title!r}", v) for e in self.effects for c in e.contrasts for v in c]
        for where, name in used:
            if name not in self.variants:
                raise UserError(
                    f"grid {self.name}, {where}: there is no variant {name!r}; there are "
                    + ", ".join(self.variants)
                )


def load_grid(path: Path) -> Grid:
    """Read a grid from a Python file that defines `GRID`, or from YAML.

    Raises:
        UserError: the file is missing, cannot be read, or does not describe a grid.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: allowed are paper, a .py or a .yaml file of a grid"
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
    except UserError:
        raise
    except Exception as error:  # whatever a user's file does
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    grid = getattr(module, "GRID", None)
    if not isinstance(grid, Grid):
        raise UserError(f"{path} must define GRID, a selfalign.study.grid.Grid")
    return grid


def _from_yaml(path: Path) -> Grid:
    try:
        values = yaml.safe_load(path.read_text())
        return grid_from_dict({"name": path.stem, **values})
    except (yaml.YAMLError, OSError, TypeError, KeyError, ValueError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{path} is not a grid: {type(error).__name__}: {line}") from error


def grid_from_dict(values: Mapping[str, Any]) -> Grid:
    """A grid from nested dictionaries and lists, as YAML and JSON hold it."""
    return Grid(
        **{
            **values,
            "variants": {name: Variant(**fields) for name, fields in values["variants"].items()},
            "tables": tuple(
                Table(**{**table, "rows": tuple(_row(row) for row in table["rows"])})
                for table in values.get("tables") or ()
            ),
            "effects": tuple(
                Effect(**{**effect, "contrasts": tuple(map(tuple, effect["contrasts"]))})
                for effect in values.get("effects") or ()
            ),
        }
    )


def _row(row: str | Mapping[str, Any]) -> Row:
    return Row(row) if isinstance(row, str) else Row(**row)

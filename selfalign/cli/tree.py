"""Settings as options: names of parts are choices, and every part's settings have a place."""

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, get_type_hints

import tyro

from selfalign import parts
from selfalign.config import RunConfig, override
from selfalign.parts import PartSettings
from selfalign.settings import require

D = TypeVar("D")
_HIDDEN = tyro.conf.Suppress[tyro.conf.Fixed[None]]


def options_of(section: D) -> D:
    """The same values in a class that tyro reads: its fields become options.

    Fields that hold names of parts list them as choices, and `PartSettings` become a section with one
    section per part. Nothing is checked there: `restore` and `build_tree` make the real thing.

    Args:
        section: a dataclass with settings.
    """
    cls: Any = type(section)
    hints = get_type_hints(cls, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for entry in dataclasses.fields(cls):
        value, hint = getattr(section, entry.name), hints[entry.name]
        if isinstance(value, PartSettings):
            value = _settings_of_parts(value)
            hint = _HIDDEN if value is None else type(value)
        elif dataclasses.is_dataclass(value):
            value = options_of(value)
            hint = type(value)
        elif kind := entry.metadata.get("kind"):
            none = entry.metadata["none"]
            names = (*((none,) if none else ()), *parts.names(kind), *parts.older_names(kind))
            choices: Any = Literal[names]
            hint = tuple[choices, ...] if isinstance(value, tuple) else choices
        told = _help_text(cls, entry.name)
        if not told and dataclasses.is_dataclass(value):
            told = _paragraphs(type(value))
        metadata = {**entry.metadata, "help": told}
        fields.append((entry.name, hint, dataclasses.field(default=value, metadata=metadata)))
    namespace = {"__doc__": cls.__doc__, "__post_init__": lambda self: None}
    options: Any = dataclasses.make_dataclass(
        cls.__name__, fields, bases=(cls,), namespace=namespace, frozen=True
    )
    return options()


def _paragraphs(cls: type) -> str:
    """A class's docstring, each paragraph on one line."""
    return "\n\n".join(" ".join(text.split()) for text in (cls.__doc__ or "").split("\n\n"))


def _help_text(cls: type, field: str) -> str | None:
    """The docstring below a field, of the class itself or of the one it comes from."""
    texts = (_docstrings_below(base.__module__).get((base.__name__, field)) for base in cls.__mro__)
    return next((text for text in texts if text), None)


@functools.cache
def _docstrings_below(module: str) -> dict[tuple[str, str], str]:
    """What stands below each field of a module's classes, by class and field.

    tyro would find the same, by reading the module once for every class and field: on Python 3.11, half of
    the time of a help text.
    """
    try:
        classes = ast.parse(inspect.getsource(sys.modules[module])).body
    except (OSError, TypeError):  # as of what is built in, or typed at a prompt
        return {}
    return {
        (cls.name, field.target.id): " ".join(below.value.value.split())
        for cls in classes
        if isinstance(cls, ast.ClassDef)
        for field, below in itertools.pairwise(cls.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _settings_of_parts(settings: PartSettings) -> Any:
    """The settings of all parts of a kind that have any, by name; None where no part does."""
    held = [
        (name.replace("-", "_"), options_of(part))
        for name, part in settings.items()
        if dataclasses.fields(part)
    ]
    if not held:
        return None
    section = dataclasses.make_dataclass(
        f"{settings.kind.capitalize()}s",
        [
            (
                name,
                type(part),
                dataclasses.field(default=part, metadata={"help": _paragraphs(type(part))}),
            )
            for name, part in held
        ],
        namespace={"__doc__": f"Settings of {settings.kind}s."},
        frozen=True,
    )
    return section()


def restore(options: Any, section: D) -> D:
    """A section with the values that tyro parsed.

    Args:
        options: what tyro made of `options_of(section)`.
        section: the section.

    Raises:
        UserError: a value is not allowed.
    """
    held: Any = section
    if isinstance(held, PartSettings):
        for name, part in ({} if options is None else _values(options)).items():
            held = held.override(name, _values(part))
        return held
    if not dataclasses.is_dataclass(held):
        return options
    cls: Any = type(held)
    values = {
        entry.name: restore(getattr(options, entry.name), getattr(held, entry.name))
        for entry in dataclasses.fields(held)
    }
    return cls(**values)


def build_tree(options: Any, base: RunConfig) -> RunConfig:
    """The config tree of what was parsed from `options_of(base)`.

    Raises:
        UserError: a value is not allowed, or belongs to a part that the tree does not choose.
    """
    own = dict(_leaves(options_of(base)))
    chosen = {name: value for name, value in _leaves(options) if value != own[name]}
    config = override(base, chosen)
    used = [part.section.replace("-", "_") for part in config.parts()]
    for name, value in chosen.items():
        part, _, _ = name.rpartition(".")
        kind, _, word = part.rpartition(".")
        if kind in parts.SECTIONS.values():
            others = [place.rpartition(".")[2] for place in used if place.startswith(f"{kind}.")]
            require(
                part in used,
                name,
                value,
                f"{word.replace('_', '-')} is not chosen, so this would have no effect; chosen {kind}: "
                + (", ".join(others).replace("_", "-") or "none"),
            )
    return config


def _values(section: Any) -> dict[str, Any]:
    return {entry.name: getattr(section, entry.name) for entry in dataclasses.fields(section)}


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in _values(section).items():
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

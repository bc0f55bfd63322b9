"""Settings: frozen dataclasses that refuse values outside their fields' types and limits."""

import dataclasses
import functools
import math
import sys
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from selfalign.errors import UserError

OPS = ("auto", "torch", "cpu")
"""Forms of the operations (`--ops`): the compiled kernels where they can be had, torch's operations
always, the compiled kernels or an error. Here, so that a refusal needs no torch."""
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    NoneType: "None",
}


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise a UserError that names a setting, its value and what is allowed, unless `condition`."""
    if not condition:
        raise UserError(f"{name} is {value!r}: {allowed}")


@dataclass(frozen=True)
class Settings:
    """A section of a config tree, or the settings of a part.

    Subclasses are frozen dataclasses with defaults; the docstring below a field is its help.
    """

    section: ClassVar[str] = ""
    """Its dotted place in the tree, as error messages and options name it."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        hints = _hints(cls)
        for name in (entry.name for entry in dataclasses.fields(self)):
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if not _fits(value, hints[name]):
                require(False, self.dotted(name), value, f"allowed are {_describe(hints[name])}")
        self.check()

    def check(self) -> None:
        """Refuse values that their types allow and their meaning does not. Nothing by default."""

    def dotted(self, name: str) -> str:
        """A field's name in the tree, as in `views.mask_ratios`."""
        return f"{self.section}.{name}" if self.section else name

    def require(self, condition: bool, name: str, allowed: str) -> None:
        """`require` for one of the fields."""
        require(condition, self.dotted(name), getattr(self, name), allowed)

    def require_number(self, name: str, low: float, high: float, allowed: str) -> None:
        """Refuse a field that is not finite or lies outside [low, high]."""
        value = getattr(self, name)
        finite = -math.inf < value < math.inf  # isfinite fails at numbers of 400 digits
        self.require(finite and low <= value <= high, name, f"allowed is {allowed}")


@functools.cache
def _hints(settings: Any) -> dict[str, Any]:
    return get_type_hints(settings)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value has a field's type. True and False are not numbers here."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in choices
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in choices)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        hints = choices[:1] * len(value) if choices[-1] is Ellipsis else choices
        return len(value) == len(hints) and all(map(_fits, value, hints))
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float and isinstance(value, int) and abs(value) > sys.float_info.max:
        return False  # arithmetic with it would fail
    return hint is Any or isinstance(value, int | float if hint is float else origin or hint)


def _describe(hint: Any) -> str:
    """What a field's type allows, in words."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return ", ".join(choices)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_describe, choices))
    if get_origin(hint) is tuple:
        many = choices[-1] is Ellipsis
        listed = ", ".join(map(_describe, choices[:1] if many else choices))
        return "any number of: " * many + listed
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")

"""Settings: frozen dataclasses that refuse values outside their fields' types and limits."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from selfalign import UserError
from selfalign.settings import Settings, require


@dataclass(frozen=True)
class Inner(Settings):
    """A section."""

    section = "outer.inner"

    share: float = 0.5
    """A number from 0 to 1."""

    def check(self) -> None:
        """Limits."""
        self.require_number("share", 0, 1, "a number from 0 to 1")


@dataclass(frozen=True)
class Example(Settings):
    """Every kind of field."""

    section = "example"

    number: float = 1.0
    """A number."""
    count: int = 1
    """A whole number."""
    switch: bool = False
    """On or off."""
    text: str = "a"
    """Some text."""
    word: Literal["left", "right"] = "left"
    """One of two words."""
    pair: tuple[float, float] = (0.0, 1.0)
    """Two numbers."""
    many: tuple[int, ...] = ()
    """Any number of them."""
    words: tuple[Literal["left", "right"], ...] = ()
    """Any number of words."""
    perhaps: int | None = None
    """A number, or nothing."""
    block: int | float | str = 1
    """One of three types."""
    inner: Inner = dataclasses.field(default_factory=Inner)
    """A section."""
    anything: Any = None
    """Whatever."""


ALLOWED = [
    ("number", 2),
    ("number", -0.5),
    ("count", -3),
    ("switch", True),
    ("text", ""),
    ("word", "right"),
    ("pair", (1, 2.5)),
    ("many", (1, 2, 3)),
    ("words", ("left", "left")),
    ("perhaps", None),
    ("perhaps", 3),
    ("block", 2),
    ("block", 0.3),
    ("block", "blocks.1.attn"),
    ("inner", Inner(share=0.1)),
    ("anything", Ellipsis),
]
REFUSED = [
    ("number", "1", "a number"),
    ("number", True, "a number"),
    ("number", None, "a number"),
    ("count", 1.0, "a whole number"),
    ("count", True, "a whole number"),
    ("switch", 1, "True or False"),
    ("switch", "yes", "True or False"),
    ("text", 3, "a text"),
    ("word", "up", "left, right"),
    ("word", None, "left, right"),
    ("pair", (1.0,), "a number, a number"),
    ("pair", (1.0, "2"), "a number, a number"),
    ("pair", 1.0, "a number, a number"),
    ("many", (1, 2.0), "any number of: a whole number"),
    ("many", 3, "any number of: a whole number"),
    ("words", ("left", "up"), "any number of: left, right"),
    ("words", "left", "any number of: left, right"),
    ("perhaps", 2.0, "a whole number or None"),
    ("perhaps", False, "a whole number or None"),
    ("block", True, "a whole number or a number or a text"),
    ("block", None, "a whole number or a number or a text"),
    ("inner", 0.5, "a Inner"),
]


@pytest.mark.parametrize(("name", "value"), ALLOWED, ids=repr)
def test_values_of_a_fields_type_are_kept(name, value):
    assert getattr(Example(**{name: value}), name) is value


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED, ids=repr)
def test_other_types_are_refused_in_one_line(name, value, allowed):
    with pytest.raises(UserError) as error:
        Example(**{name: value})
    assert str(error.value) == f"example.{name} is {value!r}: allowed are {allowed}"


def test_lists_become_tuples():
    assert Example(many=[1, 2], pair=[0, 1]) == Example(many=(1, 2), pair=(0, 1))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_limits_are_checked_and_not_finite_numbers_are_outside_of_all(share):
    with pytest.raises(UserError) as error:
        Inner(share=share)
    assert str(error.value) == f"outer.inner.share is {share}: allowed is a number from 0 to 1"


def test_what_replaces_a_field_is_checked_too():
    with pytest.raises(UserError, match=r"outer\.inner\.share is 2"):
        dataclasses.replace(Inner(), share=2)


def test_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().share = 0.1  # type: ignore[misc]


def test_without_a_section_a_field_goes_by_its_own_name():
    @dataclass(frozen=True)
    class Bare(Settings):
        steps: int = 1

    with pytest.raises(UserError, match=r"^steps is 'a': allowed are a whole number$"):
        Bare(steps="a")


def test_require_is_silent_where_all_is_well():
    require(True, "name", 1, "nothing else")
    with pytest.raises(UserError, match=r"^name is 1: nothing else$"):
        require(False, "name", 1, "nothing else")

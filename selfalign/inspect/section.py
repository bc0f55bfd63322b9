"""What an analysis found, for a page and for a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfalign.pages.figures import Chart
from selfalign.pages.numbers import Measured


@dataclass(frozen=True)
class Table:
    """Rows of numbers or words."""

    caption: str
    columns: Sequence[str]
    """Headings, that of the row's name included."""
    rows: Sequence[tuple[str, Sequence[Measured | float | str | None]]]


@dataclass(frozen=True)
class About:
    """What an analysis is, whatever it finds."""

    title: str
    question: str
    """What it asks, in a sentence."""
    definition: str
    """What is computed."""
    control: str = ""
    """What the numbers are to be compared with."""
    needs_all_tokens: bool = False
    """Whether the student has to see every token that the teacher sees."""
    mixes_timesteps: bool = False
    """Whether it shows groups that see each other and have two timesteps."""
    pads: bool = False
    """Whether samples that end early can be looked at."""

    def left_out(self, reason: object) -> "Section":
        """The section of a model that it says nothing about."""
        return Section(self, notes=[f"left out: {reason}"])


@dataclass(frozen=True)
class Section:
    """One analysis of one model."""

    about: About
    findings: Sequence[str] = ()
    """Sentences with the numbers that answer the question, the most telling first."""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    """What was left out, and why."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Everything that was measured, as JSON can hold it."""

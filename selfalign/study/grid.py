"""What a study compares: variants, the tables they stand in, and the effects read off them."""

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selfalign.config import OLDER_NAMES
from selfalign.errors import UserError
from selfalign.parts import require_named_plugins
from selfalign.recipes import recipe
from selfalign.study.parsing import checked

LONGEST_NAME = 300
Pairs = tuple[tuple[str, str], ...]
"""Pairs of variants, (with, without)."""


_OF_STUDY = {"seed": "--seeds", "data.train_fraction": "--data.train-fraction"}
"""Settings in which a study's runs differ besides their variants, and the options that give them."""


@dataclass(frozen=True)
class Variant:
    """One point of the factorial space: a recipe, and the settings that differ from it."""

    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields by dotted name, as in `{"views.mask_ratios": (0.35, 0.65)}`."""
    after: str = ""
    """The variant, earlier in the grid, from whose last weights at the same seed this one starts."""

    def __post_init__(self) -> None:
        require_named_plugins(self.settings.get("plugins", ()))
        names = [OLDER_NAMES.get(name, name) for name in self.settings]
        for given, name in zip(self.settings, names, strict=True):
            if names.count(name) > 1 or any(other.startswith(f"{name}.") for other in names):
                raise UserError(f"{given} is given twice, by two names")
        for name, option in _OF_STUDY.items():
            if name in self.settings:
                raise UserError(
                    f"{name} is {self.settings[name]!r}: the study gives it, by {option}"
                )
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
    contrasts: Pairs
    """Pairs of variants, (with, without), that differ in one switch."""
    claim: str = ""
    """What the paper says about it; begins with Yes, No or Equal where numbers can be held against it."""
    minus: Pairs = ()
    """Pairs whose mean difference is subtracted: the effect is then a difference of differences."""
    half_of: str = ""
    """Title of the effect of which half is this one's margin; left out: a share of the metric."""

    @property
    def expected(self) -> Literal["", "gain", "no gain", "equal"]:
        """What the claim foretells, as far as it begins with an answer."""
        answers: dict[str, Literal["gain", "no gain", "equal"]]
        answers = {"Yes": "gain", "No": "no gain", "Equal": "equal"}
        return next((kind for word, kind in answers.items() if self.claim.startswith(word)), "")

    @property
    def weights(self) -> dict[str, float]:
        """The effect as a weighted sum of the variants' means; the weights add up to 0."""
        weights: dict[str, float] = {}
        for pairs, sign in ((self.contrasts, 1), (self.minus, -1)):
            for pair in pairs:
                for name, side in zip(pair, (sign, -sign), strict=True):
                    weights[name] = weights.get(name, 0.0) + side / len(pairs)
        return weights

    @property
    def reference(self) -> dict[str, float]:
        """Weights of the mean that the effect is relative to: of the variants without."""
        weights: dict[str, float] = {}
        for _, without in self.contrasts:
            weights[without] = weights.get(without, 0.0) + 1 / len(self.contrasts)
        return weights


@dataclass(frozen=True)
class Grid:
    """The variants of a study by name, each run once whatever the tables that show it."""

    name: str
    variants: Mapping[str, Variant]
    tables: tuple[Table, ...] = ()
    effects: tuple[Effect, ...] = ()
    baseline: str = ""
    """The variant whose final quality the others are timed to; left out: the first."""
    separations: Pairs = ()
    """Pairs of variants, (separated, whole), of which the report says what separation costs."""
    shares: Pairs = ()
    """Pairs of effects by title, (part, whole), of which the report says which share the part is."""
    pools: tuple[tuple[str, ...], ...] = ()
    """Variants whose runs are taken to be equally noisy: an effect's error is pooled over the first of these
    groups that holds all of its variants. Left out, or where none does: over all."""
    tuned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that effects may use beside those of variants, and the variants of which each is the best: chosen
    by the held-out loss at the first seeds and compared at the others, so that no run is chosen by luck."""

    def __post_init__(self) -> None:
        if not self.variants:
            raise UserError(f"grid {self.name} has no variants: at least one is needed")
        _require_line("the grid's name", self.name)
        earlier: list[str] = []
        for name, variant in self.variants.items():
            _require_line("a variant's name", name)
            _require_no_path(name, self.variants)
            if variant.after and variant.after not in earlier:
                raise UserError(
                    f"variant {name!r}: after is {variant.after!r}, which is no variant before it"
                )
            earlier.append(name)
        if not self.baseline:
            object.__setattr__(self, "baseline", next(iter(self.variants)))
        used = [("baseline", self.baseline)]
        used += [(f"table {t.title!r}", row.variant) for t in self.tables for row in t.rows]
        used += [("separations", name) for pair in self.separations for name in pair]
        used += [("pools", name) for group in self.pools for name in group]
        used += [
            (f"tuned {tuned!r}", name) for tuned, names in self.tuned.items() for name in names
        ]
        for effect in self.effects:
            for pair in (*effect.contrasts, *effect.minus):
                used += [(f"effect {effect.title!r}", name) for name in pair]
                if pair[0] == pair[1]:
                    raise UserError(f"effect {effect.title!r} compares {pair[0]!r} with itself")
            names = set(effect.weights)
            if names & set(self.tuned) and not names <= set(self.tuned):
                raise UserError(
                    f"effect {effect.title!r} compares tuned variants with others: allowed are either"
                )
            if not effect.contrasts:
                raise UserError(f"effect {effect.title!r} has no contrasts: one or more are needed")
        for name in self.tuned:
            _require_line("a tuned variant's name", name)
            if name in self.variants or not self.tuned[name]:
                raise UserError(
                    f"tuned {name!r} of grid {self.name}: needed are a name that no variant has, and the "
                    "variants to choose from"
                )
        for where, name in used:
            if name not in self.variants and not (
                where.startswith("effect") and name in self.tuned
            ):
                raise UserError(
                    f"{where} of grid {self.name}: there is no variant {name!r}; there are "
                    + ", ".join(self.variants)
                )
        self._check_texts()

    def with_parts(self, settings: Mapping[str, Any]) -> "Grid":
        """The grid with settings of parts in those variants that use them; a variant's own come first.

        Args:
            settings: by dotted name, as in `{"projectors.mlp3.width": 192}`.
        """

        def filled(variant: Variant) -> Variant:
            parts = recipe(variant.recipe, variant.settings).parts()
            used = {part.section for part in parts}
            own = {k: v for k, v in settings.items() if k.rpartition(".")[0] in used}
            return dataclasses.replace(variant, settings={**own, **variant.settings})

        variants = {name: filled(variant) for name, variant in self.variants.items()}
        return dataclasses.replace(self, variants=variants)

    def judging(self, effect: Effect, seeds: int) -> int:
        """At how many of a study's seeds an effect is measured."""
        return seeds - (choosing_seeds(seeds) if set(effect.weights) & set(self.tuned) else 0)

    def pool(self, effect: Effect) -> tuple[str, ...]:
        """The variants, or tuned ones, over which the error of an effect is pooled."""
        whole = next((other for other in self.effects if other.title == effect.half_of), effect)
        return self.pool_of({*effect.weights, *whole.weights})

    def pool_of(self, names: Collection[str]) -> tuple[str, ...]:
        """The first of the groups of variants that are equally noisy that holds all of these."""
        groups = (*self.pools, tuple(self.variants), tuple(self.tuned))
        return next(group for group in groups if set(names) <= set(group))

    def _check_texts(self) -> None:
        titles = [effect.title for effect in self.effects]
        for kind, named in (("effect", titles), ("table", [table.title for table in self.tables])):
            for title in named:
                _require_line(f"the title of a{'n' * (kind == 'effect')} {kind}", title)
            if doubled := sorted({title for title in named if named.count(title) > 1}):
                raise UserError(f"{kind} {doubled[0]!r} stands twice: titles must differ")
        for effect in self.effects:
            if effect.half_of and effect.half_of not in titles:
                raise UserError(
                    f"effect {effect.title!r}: half_of is {effect.half_of!r}, which is no effect's title"
                )
        for title in (title for pair in self.shares for title in pair):
            if title not in titles:
                raise UserError(f"shares of grid {self.name}: {title!r} is no effect's title")
        texts = [text for e in self.effects for text in (e.question, e.claim)]
        for table in self.tables:
            texts.append(table.note)
            for row in table.rows:
                texts += [*row.factors, *row.factors.values(), *row.paper]
        for text in texts:
            if bad := _control_characters(text, allowed="\n\t"):
                raise UserError(
                    f"a text of grid {self.name} holds the characters {bad!a}: {text!a}"
                )


def choosing_seeds(seeds: int) -> int:
    """How many of a study's seeds, the first ones, choose what tuned names stand for."""
    return max(1, seeds // 3)


def _control_characters(text: str, allowed: str = "") -> str:
    """What no file and no page can show: control characters and halves of surrogate pairs."""
    return "".join(c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in allowed)


def _require_line(what: str, text: str) -> None:
    """Refuse what cannot stand in one line of a report."""
    if not text.strip() or len(text) > LONGEST_NAME or _control_characters(text):
        shown = ascii(text if len(text) <= LONGEST_NAME else text[:20] + "…")
        raise UserError(
            f"{what} is {shown}: allowed are 1 to {LONGEST_NAME} characters without line breaks and "
            "other control characters"
        )


def _require_no_path(name: str, names: Iterable[str]) -> None:
    """Refuse a name that was meant as a path: it would lead elsewhere, or into another's folder.

    No name is used as a path in any case (`selfalign.study.plan.folder_name`).
    """
    parts = re.split(r"[/\\]", name)
    above = {name[: found.start()] for found in re.finditer(r"[/\\]", name)}
    if {"", ".", ".."} & set(parts) or above & set(names):
        raise UserError(f"a variant's name is {name!r}: a path is no name")


def grid_from_dict(values: Mapping[str, Any], where: object) -> Grid:
    """A grid from nested dictionaries and lists, as YAML and JSON hold it.

    Args:
        values: the fields; a row may be the name of its variant alone.
        where: the file; begins the message.

    Raises:
        UserError: it describes no grid.
    """
    given = dict(values)
    variants = given.pop("variants", None)
    if not isinstance(variants, dict):
        raise UserError(f"{where} is not a grid: variants must hold names, each with a recipe")
    tables = given.get("tables")
    if isinstance(tables, list):
        given["tables"] = [_with_whole_rows(table) for table in tables]
    return checked(
        {
            **{name: value for name, value in given.items() if value is not None},
            "variants": {
                name: checked(fields, Variant, f"{where}, variant {name!r}")
                for name, fields in variants.items()
            },
        },
        Grid,
        where,
    )


def _with_whole_rows(table: object) -> object:
    if not isinstance(table, dict) or not isinstance(table.get("rows"), Iterable):
        return table
    rows = [{"variant": row} if isinstance(row, str) else row for row in table["rows"]]
    return {**table, "rows": rows}

"""The grids that a study can be named by: the paper's, the neighbours', and those that ask why."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from selfalign.study.grid import Effect, Grid, Pairs, Row, Table, Variant
from selfalign.study.methods import HASTE, METHODS
from selfalign.study.paper import CORNERS, EFFECTS, PAPER, SEPARATIONS, TWO_BY_TWO

_SIMPLE = TWO_BY_TWO.variants


def _corners(suffix: str, settings: Mapping[str, Any]) -> dict[str, Variant]:
    """The four corners with further settings, each named by what sets it apart."""
    return {f"{name}_{suffix}": Variant(name, settings) for name in CORNERS}


def _table(title: str, column: str, rows: Mapping[str, str]) -> Table:
    """A row per variant, with the value of what is varied."""
    return Table(title, tuple(Row(name, {column: value}) for name, value in rows.items()))


def _renamed(effects: Sequence[Effect], suffix: str, title: str) -> list[Effect]:
    """Effects of variants that are called by a further suffix, with the same claims."""

    def pairs(of: Pairs) -> Pairs:
        return tuple((first + suffix, second + suffix) for first, second in of)

    return [
        dataclasses.replace(
            effect,
            title=f"{effect.title}, {title}",
            contrasts=pairs(effect.contrasts),
            minus=pairs(effect.minus),
            half_of=f"{effect.half_of}, {title}" if effect.half_of else "",
        )
        for effect in effects
    ]


def _separations(*suffixes: str) -> Pairs:
    """The pairs whose cost of separation is told, of variants that are called by a further suffix."""
    return tuple((a + suffix, b + suffix) for suffix in suffixes for a, b in SEPARATIONS)


_INTERACTION = (EFFECTS[0], EFFECTS[-1])
"""The dual gain under full attention, and the difference of differences."""


def _stratified() -> Grid:
    """Is the gain of dual timesteps that a batch covers more noise levels?"""

    def settings(name: str) -> dict[str, Any]:
        kind = "stratified-independent" if "dts" in name else "stratified"
        return {"views.timesteps": kind}

    even = {f"{name}_stratified": Variant(name, settings(name)) for name in CORNERS}
    dual, own = (
        EFFECTS[0],
        Effect(
            "Stratified timesteps, full attention",
            "Does it help a single timestep to cover t evenly in every batch?",
            (("sra_stratified", "sra"),),
            "Yes: dual timesteps help because a gradient sees more noise levels.",
        ),
    )
    share = Effect(
        "Dual timesteps beyond coverage",
        "Is anything left of the gain of dual timesteps where both cover t evenly?",
        (("sra-dts_stratified", "sra_stratified"),),
        "No: the gain is that of coverage.",
        half_of=dual.title,
    )
    rows = {**dict.fromkeys(CORNERS, "as drawn"), **dict.fromkeys(even, "stratified")}
    effects = (
        dual,
        own,
        share,
        *_renamed(EFFECTS, "_stratified", "stratified"),
    )
    return Grid(
        "stratified",
        {**_SIMPLE, **even},
        (_table("Timesteps over a batch", "timesteps", rows),),
        effects,
        "sra",
        _separations("", "_stratified"),
        shares=((own.title, dual.title),),
    )


def _learning_rates() -> Grid:
    """Does the answer hold with the learning rate that suits each variant best?"""
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    variants: dict[str, Variant] = {}
    for rate in rates:
        variants |= _corners(f"lr{rate:g}", {"training.learning_rate": rate})
    rows = {
        name: f"{variant.settings['training.learning_rate']:g}"
        for name, variant in variants.items()
    }
    tuned = {f"{name} tuned": tuple(f"{name}_lr{rate:g}" for rate in rates) for name in CORNERS}
    effects = _renamed(EFFECTS, " tuned", "tuned")
    for rate in rates:
        effects += [
            dataclasses.replace(effect, claim="")
            for effect in _renamed(_INTERACTION, f"_lr{rate:g}", f"{rate:g}")
        ]
    return Grid(
        "learning-rates",
        variants,
        (_table("Learning rates", "learning rate", rows),),
        tuple(effects),
        f"sra_lr{rates[2]:g}",
        _separations(*(f"_lr{rate:g}" for rate in rates)),
        tuned=tuned,
        pools=tuple(tuple(f"{name}_lr{rate:g}" for name in CORNERS) for rate in rates),
    )


def _patches(name: str, patches: tuple[int, ...]) -> Grid:
    """How do separation and interaction go with the number of tokens of the same images?"""
    variants: dict[str, Variant] = {}
    effects: list[Effect] = []
    for patch in patches:
        variants |= _corners(f"patch{patch}", {"model.size": f"tiny/{patch}"})
        effects += _renamed(_INTERACTION, f"_patch{patch}", f"patch {patch}")
    rows = {name: variant.settings["model.size"] for name, variant in variants.items()}
    return Grid(
        name,
        variants,
        (_table("Patches", "model", rows),),
        tuple(effects),
        f"sra_patch{patches[0]}",
        _separations(*(f"_patch{patch}" for patch in patches)),
        pools=tuple(tuple(f"{name}_patch{patch}" for name in CORNERS) for patch in patches),
    )


def _no_alignment() -> Grid:
    """Are the effects those of alignment at all?"""
    variants = {**_SIMPLE, **_corners("lambda0", {"terms.alignment.weight": 0.0})}
    rows = {name: "0" if name.endswith("lambda0") else "0.5" for name in variants}
    effects = [*EFFECTS, *_renamed(EFFECTS, "_lambda0", "λ = 0")]
    return Grid(
        "no-alignment",
        variants,
        (_table("Weight of the alignment loss", "λ", rows),),
        tuple(effects),
        "sra",
        _separations("", "_lambda0"),
    )


def _whole_after() -> Grid:
    """Is what separation costs a mismatch, which some steps on whole images remove?"""
    variants: dict[str, Variant] = {name: _SIMPLE[name] for name in CORNERS[:2]}
    rows = dict.fromkeys(variants, "0")
    effects = [dataclasses.replace(EFFECTS[2], title="Separation, no steps after", claim="")]
    pairs = [SEPARATIONS[0]]
    for steps in (80, 400, 800):
        for name in CORNERS[:2]:
            variants[f"{name}_then{steps}"] = Variant("sra", {"training.steps": steps}, after=name)
            rows[f"{name}_then{steps}"] = str(steps)
        pair = (f"sra-as_then{steps}", f"sra_then{steps}")
        pairs.append(pair)
        effects.append(
            Effect(
                f"Separation, {steps} steps after",
                "Does it still cost after as many more steps on whole images, both ways?",
                (pair,),
                "Equal: the cost is that of a mismatch.",
            )
        )
    return Grid(
        "whole-after",
        variants,
        (_table("Steps on whole images afterwards", "steps", rows),),
        tuple(effects),
        "sra",
        tuple(pairs),
    )


def _group_sizes() -> Grid:
    """How does the cost of separation go with the share of the first group?"""
    shares = {count: (count / 16, 1 - count / 16) for count in (1, 2, 4, 8)}
    variants = {
        "sra": _SIMPLE["sra"],
        **{
            f"sra-as_{k}of16": Variant("sra-as", {"views.mask_ratios": s})
            for k, s in shares.items()
        },
    }
    rows = {name: name.partition("_")[2] or "none" for name in variants}
    effects = tuple(
        Effect(f"Separation, {k} of 16", "What does it cost?", ((f"sra-as_{k}of16", "sra"),))
        for k in shares
    )
    pairs = tuple((f"sra-as_{k}of16", "sra") for k in shares)
    return Grid(
        "group-sizes",
        variants,
        (_table("Share of the first group", "tokens", rows),),
        effects,
        "sra",
        pairs,
    )


def _mixing() -> Grid:
    """Do whole images remove what two timesteps cost where both are high?"""
    shares = (0.1, 0.25)
    mixed = {
        f"sra-dts_rho{share:g}": Variant("sra-dts", {"views.whole_image_fraction": share})
        for share in shares
    }
    variants = {"sra": _SIMPLE["sra"], "sra-dts": _SIMPLE["sra-dts"], **mixed}
    rows = {name: name.partition("_rho")[2] or "0" for name in variants}
    effects = [EFFECTS[0]]
    effects += [
        Effect(f"Whole images, {share:g}", "Do they help?", ((f"sra-dts_rho{share:g}", "sra-dts"),))
        for share in shares
    ]
    return Grid(
        "mixing",
        variants,
        (_table("Whole images", "share", rows),),
        tuple(effects),
        "sra",
    )


_QUARTER = {"views.mask_ratios": (0.25, 0.75)}
_PARTITIONS: Mapping[str, Mapping[str, Any]] = {
    "random": _QUARTER,
    "blocks": {**_QUARTER, "views.partition": "blocks"},
    "stripes": {**_QUARTER, "views.partition": "stripes"},
    "checkerboard": {**_QUARTER, "views.partition": "checkerboard"},
    "energy": {**_QUARTER, "views.partition": "energy"},
    "clusters": {**_QUARTER, "views.partition": "clusters"},
    "difficulty": {**_QUARTER, "views.partition": "difficulty"},
    "hard first": {
        **_QUARTER,
        "views.partition": "difficulty",
        "partitions.difficulty.first": "high",
    },
    "three groups": {"views.mask_ratios": (0.25, 0.25, 0.5)},
    "four groups": {"views.mask_ratios": (0.25,) * 4},
    "half to quarter": {
        **_QUARTER,
        "views.curriculum": "ramp",
        "curriculums.ramp.mask_ratios": (0.5,),
        "curriculums.ramp.steps": 200,
    },
    "whole images at first": {
        **_QUARTER,
        "views.curriculum": "ramp",
        "curriculums.ramp.whole_image_fraction": 0.5,
        "curriculums.ramp.steps": 200,
    },
    "bandit": {
        **_QUARTER,
        "views.curriculum": "bandit",
        "curriculums.bandit.every": 25,
        "curriculums.bandit.pairs": 200,
    },
    "smaller group counts double": {**_QUARTER, "terms.denoising.group_weights": (2.0, 1.0)},
    "smaller group not scored": {**_QUARTER, "terms.denoising.group_weights": (0.0, 1.0)},
    "a quarter dropped": {
        "views.mask_ratios": (0.25, 0.5, 0.25),
        "views.hidden_groups": 1,
    },
    "a quarter passes by": {
        "views.mask_ratios": (0.25, 0.5, 0.25),
        "views.hidden_groups": 1,
        "views.skipped_blocks": (2, 5),
        "terms.alignment.group_weights": (1.0, 1.0, 0.0),
    },
    "a quarter masked": {
        "views.mask_ratios": (0.25, 0.5, 0.25),
        "views.hidden_groups": 1,
        "views.skipped_blocks": (1, 4),
        "views.hidden_as": "mask",
        "terms.denoising.group_weights": (1.0, 1.0, 0.1),
        "terms.alignment.group_weights": (1.0, 1.0, 0.0),
    },
}
"""What tokens are grouped by, and what becomes of a group; all else is sra-dts-as."""


def _partitions() -> Grid:
    """Does it matter which tokens share a timestep, how many groups there are, and what becomes of them?"""
    baseline = "random"
    variants = {name: Variant("sra-dts-as", settings) for name, settings in _PARTITIONS.items()}
    effects = tuple(
        Effect(
            f"{name} or random", "Better than random groups of 1/4 and 3/4?", ((name, baseline),)
        )
        for name in variants
        if name != baseline
    )
    table = _table("Partitions", "grouping", {name: name for name in variants})
    return Grid("partitions", variants, (table,), effects, baseline)


GRIDS: Mapping[str, tuple[Grid, int | None]] = {
    grid.name: (grid, seeds)
    for grid, seeds in (
        (PAPER, None),
        (TWO_BY_TWO, 10),
        (METHODS, 5),
        (HASTE, 5),
        (_stratified(), 10),
        (_learning_rates(), 4),
        (_patches("patches-4-2-1", (4, 2, 1)), 3),
        (_patches("patches-4-2", (4, 2)), 3),
        (_no_alignment(), 5),
        (_whole_after(), 5),
        (_group_sizes(), 5),
        (_mixing(), 5),
        (_partitions(), 3),
    )
}
"""Grids by the name that the command line takes, each with its number of seeds where it has one."""

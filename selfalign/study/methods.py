"""The neighbours beside each other: what features are aligned with × timesteps × attention.

The papers' figures are those of SiT-XL/2 on ImageNet 256² with guidance.
"""

from collections.abc import Mapping
from typing import Any

from selfalign.study.grid import Effect, Grid, Row, Table, Variant

_DUAL = {"views.timesteps": "independent", "views.mask_ratios": (0.25, 0.75)}
_SEPARATED = {"views.attention": "separated", "views.mask_ratios": (0.25, 0.75)}
_SWITCHES: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "-as": _SEPARATED,
    "-dts": _DUAL,
    "-dts-as": {**_DUAL, **_SEPARATED},
}
"""Single or dual timesteps, full or separated attention, by what the names end with."""


def _corners(recipe: str) -> dict[str, Variant]:
    """A recipe under every combination of timesteps and attention; an EMA teacher sees the groups too."""
    teacher = {"targets.ema.groups": True} if recipe == "sra" else {}
    return {
        f"{recipe}{ending}": Variant(recipe, {**teacher, **switches} if switches else {})
        for ending, switches in _SWITCHES.items()
    }


_TARGETS = {
    "sit": "none",
    "sra": "EMA, later block (SRA)",
    "repa": "frozen encoder (REPA)",
    "layersync": "later block of the same pass (LayerSync)",
    "sra2": "clean input (SRA 2)",
}
_REPORTED = {
    "sit": {"FID, XL/2, guided": 2.06, "IS": 270.3},
    "sra": {"FID, XL/2, guided": 1.58, "IS": 311.4},
    "sra-dts-as": {"FID, XL/2, guided": 1.44, "IS": 315.3},
    "repa": {"FID, XL/2, guided": 1.42, "IS": 305.7},
    "self-flow": {"FID, XL/2, guided": 1.47, "IS": 305.4},
}
_OTHERS = {
    "irepa": "frozen encoder, normalised, convolution (iREPA)",
    "sra-published": "EMA, smooth-L1 (SRA as published)",
    "self-flow": "EMA, whole image at the smaller timestep (Self-Flow)",
}


def _table(title: str, recipes: Mapping[str, str], note: str) -> Table:
    rows = [
        Row(
            f"{recipe}{ending}",
            {
                "target": target,
                "timesteps": "dual" if "-dts" in ending else "single",
                "attention": "separated" if ending.endswith("-as") else "full",
            },
            _REPORTED.get(f"{recipe}{ending}", {}),
        )
        for recipe, target in recipes.items()
        for ending in _SWITCHES
    ]
    return Table(title, tuple(rows), note)


_METHODS_TABLE = _table(
    "Targets × timesteps × attention",
    _TARGETS,
    "Every target under single and dual timesteps, full and separated attention.",
)
_OTHERS_TABLE = Table(
    "Other methods",
    (
        *(
            Row(name, {"target": _TARGETS[name], "timesteps": "single"}, _REPORTED[name])
            for name in ("sra", "repa")
        ),
        *(
            Row(
                name,
                {"target": target, "timesteps": "dual" if name == "self-flow" else "single"},
                _REPORTED.get(name, {}),
            )
            for name, target in _OTHERS.items()
        ),
    ),
    "Published variations of two of these targets, with full attention.",
)

_SWITCHED = {
    "Dual timesteps": ("-dts", ""),
    "Separation": ("-as", ""),
    "Dual timesteps and separation": ("-dts-as", ""),
}
"""What is switched on, with full attention or a single timestep where it is not named."""


def _pair(recipe: str, endings: tuple[str, str]) -> tuple[tuple[str, str]]:
    return ((recipe + endings[0], recipe + endings[1]),)


def _of_target(recipe: str, claims: Mapping[str, str]) -> list[Effect]:
    """The switches under one target."""
    return [
        Effect(
            f"{what}, {recipe}",
            f"Does it help where the target is: {_TARGETS[recipe]}?",
            _pair(recipe, endings),
            claims.get(what, ""),
        )
        for what, endings in _SWITCHED.items()
    ]


def _beside(recipe: str, other: str) -> list[Effect]:
    """What a switch is worth under one target less what it is worth under another."""
    return [
        Effect(
            f"{what}, {recipe} less {other}",
            f"Is it worth less with one target ({_TARGETS[recipe]}) than with another ({_TARGETS[other]})?",
            _pair(recipe, endings),
            minus=_pair(other, endings),
        )
        for what, endings in _SWITCHED.items()
    ]


_EXTERNAL_CLAIMS = {
    "Dual timesteps": "Yes: an external target does not make dual timesteps superfluous.",
    "Separation": "Yes: an external target does not make separation superfluous.",
}

METHODS = Grid(
    name="methods",
    variants={
        **{name: found for recipe in _TARGETS for name, found in _corners(recipe).items()},
        **{name: Variant(name) for name in _OTHERS},
    },
    tables=(_METHODS_TABLE, _OTHERS_TABLE),
    effects=(
        *(
            effect
            for recipe in ("repa", "sit", "sra", "layersync", "sra2")
            for effect in _of_target(recipe, _EXTERNAL_CLAIMS if recipe == "repa" else {})
        ),
        *(effect for other in ("sit", "sra") for effect in _beside("repa", other)),
        *(
            Effect(f"Alignment, {recipe}", "Does the target help alone?", ((recipe, "sit"),))
            for recipe in (*_TARGETS, *_OTHERS)
            if recipe not in ("sit", "self-flow")
        ),
    ),
    baseline="sit",
    separations=tuple(
        (f"{recipe}{timesteps}-as", f"{recipe}{timesteps}")
        for recipe in _TARGETS
        for timesteps in ("", "-dts")
    ),
)
"""Does an external target make separation or dual timesteps superfluous?"""

HASTE = Grid(
    name="haste",
    variants=_corners("repa") | _corners("haste"),
    tables=(
        _table(
            "Attention distillation × timesteps × attention",
            {"repa": _TARGETS["repa"], "haste": "frozen encoder and its attention (HASTE)"},
            "HASTE distils attention too: its encoder is a vision transformer that runs along.",
        ),
    ),
    effects=tuple(
        Effect(
            f"Attention distillation{ending.replace('-', ', ', 1)}",
            "Does the encoder's attention help beside its features?",
            ((f"haste{ending}", f"repa{ending}"),),
        )
        for ending in _SWITCHES
    ),
    baseline="repa",
)
"""What the encoder's attention adds: a grid of its own, since it needs a vision transformer's weights."""

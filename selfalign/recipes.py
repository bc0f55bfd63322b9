"""Named points of the factorial space (METHOD: SiT, SRA, Self-Flow, and the paper's variants).

Two recipes differ in nothing but what their entries below say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfalign.config import RunConfig, override
from selfalign.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """A named point: what sets it apart in words, and the fields that do."""

    summary: str
    settings: Mapping[str, Any]


_EMA_TEACHER = {"alignment.target": "ema"}
_DUAL = {"views.timesteps": "dual", "views.mask_ratios": (0.25, 0.75)}
_SEPARATED = {"views.attention": "separated", "views.mask_ratios": (0.25, 0.75)}
_GROUPED_TEACHER = {**_EMA_TEACHER, "alignment.teacher_groups": True}

RECIPES: dict[str, Recipe] = {
    "sit": Recipe("flow matching alone: one timestep, full attention, no alignment", {}),
    "sra": Recipe(
        "aligned with the EMA teacher's later block, which sees the image at t - U(0, 0.2)",
        _EMA_TEACHER,
    ),
    "self-flow": Recipe(
        "dual timesteps, full attention; the teacher sees the whole image at the smaller timestep",
        {
            **_EMA_TEACHER,
            **_DUAL,
            "alignment.teacher_timestep": "self-flow",
            "alignment.weight": 0.8,
        },
    ),
    "sra-dts": Recipe(
        "sra with dual timesteps; the teacher sees the same groups, each at t_k - U(0, 0.2)",
        {**_GROUPED_TEACHER, **_DUAL},
    ),
    "sra-as": Recipe(
        "sra with separated attention at one timestep, in student and teacher",
        {**_GROUPED_TEACHER, **_SEPARATED},
    ),
    "sra-dts-as": Recipe(
        "the paper's recipe: dual timesteps and separated attention, in student and teacher",
        {**_GROUPED_TEACHER, **_DUAL, **_SEPARATED},
    ),
}


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The config tree of a named recipe, with fields replaced by dotted name.

    Raises:
        UserError: no such recipe or field, or a combination that is not allowed.
    """
    if name not in RECIPES:
        raise UserError(f"recipe is {name!r}: allowed are {', '.join(RECIPES)}")
    return override(RunConfig(), {**RECIPES[name].settings, **(overrides or {})})

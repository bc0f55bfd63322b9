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


_EMA_TEACHER = {"terms.alignment.target": "ema"}
_DUAL = {"views.timesteps": "independent", "views.mask_ratios": (0.25, 0.75)}
_SEPARATED = {"views.attention": "separated", "views.mask_ratios": (0.25, 0.75)}
_GROUPED_TEACHER = {**_EMA_TEACHER, "targets.ema.groups": True}

_PAPER = {**_GROUPED_TEACHER, **_DUAL, **_SEPARATED}
_IMAGENET = {
    **_PAPER,
    # As released: the teacher stays near its first weights for some thousand steps.
    "training.ema_warmup": False,
    "training.precision": "bf16",
    "data.name": "latents",
    "data.workers": 2,
}
_XL = {"model.size": "XL/2", "terms.alignment.block": 8, "targets.ema.block": 20}

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
            "targets.ema.timestep": "minimum",
            "terms.alignment.weight": 0.8,
        },
    ),
    "sra-dts": Recipe(
        "sra with dual timesteps; the teacher sees the same groups, each at t_k - U(0, 0.2)",
        {**_GROUPED_TEACHER, **_DUAL},
    ),
    "sra-as": Recipe(
        "sra with separated attention at one timestep, in student and teacher, and nothing else",
        {**_GROUPED_TEACHER, **_SEPARATED},
    ),
    "sra-as-released": Recipe(
        "sra-as as released: the teacher sees each group at a timestep of its own, t - U(0, 0.2)",
        {**_GROUPED_TEACHER, **_SEPARATED, "targets.ema.lag": "group"},
    ),
    "sra-dts-as": Recipe(
        "the paper's recipe: dual timesteps and separated attention, in student and teacher",
        _PAPER,
    ),
    "imagenet256-xl2": Recipe(
        "sra-dts-as at the paper's full size: SiT-XL/2 on latents of 32×32, 4M steps of batch 256",
        {
            **_IMAGENET,
            **_XL,
            "model.image_size": (32, 32),
            "training.steps": 4_000_000,
            "data.root": "data/imagenet256",
        },
    ),
    "imagenet256-b2": Recipe(
        "sra-dts-as as in the paper's ablations: SiT-B/2 on latents of 32×32, 800K steps",
        {
            **_IMAGENET,
            "model.size": "B/2",
            "model.image_size": (32, 32),
            "terms.alignment.block": 4,
            "targets.ema.block": 8,
            "training.steps": 800_000,
            "data.root": "data/imagenet256",
        },
    ),
    "imagenet512-xl2": Recipe(
        "sra-dts-as at 512×512 pixels: SiT-XL/2 on latents of 64×64, 1M steps of batch 256",
        {
            **_IMAGENET,
            **_XL,
            "model.image_size": (64, 64),
            "training.steps": 1_000_000,
            "data.root": "data/imagenet512",
        },
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

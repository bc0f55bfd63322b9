"""Named points of the space: SiT, SRA, Self-Flow, the paper's variants, and the neighbours with their papers'
settings.

Two recipes differ in nothing but what their entries below say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from selfalign.config import RunConfig, override
from selfalign.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """A named point: what sets it apart in words, and the fields that do."""

    summary: str
    settings: Mapping[str, Any]
    needs: str = "nothing"
    """Besides images: an encoder, latents, or nothing."""
    reported: str = ""
    """Its paper's own number: ImageNet 256², SiT-XL/2."""
    proof: str = ""
    """The recorded case in tests/golden that its objective is checked with."""


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

_REPA = {"terms.alignment.target": "frozen-encoder", "terms.alignment.projector": "mlp3"}
_IREPA = {
    **_REPA,
    "terms.alignment.projector": "conv",
    "terms.alignment.spatial_norm": "zscore",
    "terms.alignment.weight": 1.0,
}
_HASTE_STOP = 250_000
_HASTE = {
    **_REPA,
    "objective.terms": ("attention-distillation",),
    "terms.alignment.stop_step": _HASTE_STOP,
    "terms.attention-distillation.stop_step": _HASTE_STOP,
}
_LAYERSYNC = {
    "terms.alignment.target": "same-pass",
    "terms.alignment.projector": "none",
    "terms.alignment.weight": 0.2,
}
_SRA2 = {
    "terms.alignment.target": "latent",
    "terms.alignment.projector": "mlp3",
    "terms.alignment.distance": "smooth-l1",
}
IMAGENET_EPOCH = 5004
"""Whole batches of 256 in an epoch of ImageNet; the papers' loaders drop the rest."""
_SRA_PUBLISHED = {
    **_EMA_TEACHER,
    "targets.ema.labels": "dropped",
    "terms.alignment.distance": "smooth-l1",
    "terms.alignment.weight": 0.2,
    "terms.alignment.decay": "exponential",
    "terms.alignment.decay_every": IMAGENET_EPOCH,
    "terms.alignment.decay_start": 149 * IMAGENET_EPOCH,
    "terms.alignment.decay_steps": 1000 * IMAGENET_EPOCH,
}

COSTS: Mapping[str, float] = {
    "sit": 1.0,
    "sra": 1.248,
    "self-flow": 1.250,
    "sra-dts": 1.250,
    "sra-as": 1.232,
    "sra-as-released": 1.232,
    "sra-dts-as": 1.232,
    "repa": 1.017,
    "irepa": 1.017,
    "haste": 1.085,
    "layersync": 1.0,
    "sra2": 1.014,
    "sra-published": 1.248,
    "repa-dts-as": 1.004,
    "irepa-dts-as": 1.004,
    "haste-dts-as": 1.070,
    "layersync-dts-as": 0.986,
    "sra2-dts-as": 1.001,
    "sra-published-dts-as": 1.232,
    "imagenet256-xl2": 1.232,
    "imagenet256-b2": 1.222,
    "imagenet512-xl2": 1.177,
}
"""Operations of a step relative to those of `sit`, counted: SiT-XL/2 at 256 tokens (the last two at their own
size), features stored; of HASTE with the encoder's pass, before it stops. A test counts them again."""

_ENCODER = "an encoder (DINOv2-B)"

_NEIGHBOURS: dict[str, Recipe] = {
    "repa": Recipe(
        "aligned with a frozen encoder's features of the clean image, through REPA's projector",
        _REPA,
        _ENCODER,
        "FID 1.42 guided, 4M steps",
        "term_repa",
    ),
    "irepa": Recipe(
        "repa with a 3×3 convolution as projector and the target normalised over tokens",
        _IREPA,
        _ENCODER,
        "faster than REPA for 27 encoders",
        "term_irepa",
    ),
    "haste": Recipe(
        "repa and the encoder's attention, both until step 250,000",
        _HASTE,
        f"{_ENCODER} that runs along",
        "REPA's best FID in 500 epochs",
    ),
    "layersync": Recipe(
        "aligned with a later block of the same pass; no teacher, no head",
        _LAYERSYNC,
        reported="8.75× fewer steps than SiT",
        proof="term_layersync",
    ),
    "sra2": Recipe(
        "aligned with the clean latent itself, through a small MLP",
        _SRA2,
        "latents (or pixels)",
        "up to 7× fewer steps than SiT",
    ),
    "sra-published": Recipe(
        "sra as first published: smooth-L1, a weight that falls from epoch 149 on, dropped labels",
        _SRA_PUBLISHED,
        reported="FID 1.58 guided, 800 epochs",
    ),
}


def _with_both(name: str, neighbour: Recipe) -> Recipe:
    """A neighbour with dual timesteps and separated attention; a teacher sees the groups too."""
    teacher = _GROUPED_TEACHER if "targets.ema.labels" in neighbour.settings else {}
    return replace(
        neighbour,
        summary=f"{name} with dual timesteps and separated attention",
        settings={**neighbour.settings, **teacher, **_DUAL, **_SEPARATED},
        reported="",
        proof="",
    )


RECIPES: dict[str, Recipe] = {
    "sit": Recipe(
        "flow matching alone: one timestep, full attention, no alignment",
        {},
        reported="FID 2.06 guided, 7M steps",
        proof="checkpoint_sit",
    ),
    "sra": Recipe(
        "aligned with the EMA teacher's later block, which sees the image at t - U(0, 0.2)",
        _EMA_TEACHER,
        reported="FID 1.58 guided, 4M steps",
        proof="sra",
    ),
    "self-flow": Recipe(
        "dual timesteps, full attention; the teacher sees the whole image at the smaller timestep",
        {
            **_EMA_TEACHER,
            **_DUAL,
            "targets.ema.timestep": "minimum",
            "terms.alignment.weight": 0.8,
        },
        reported="FID 1.47 guided, 4M steps",
        proof="self_flow",
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
        proof="sra_as",
    ),
    "sra-dts-as": Recipe(
        "the paper's recipe: dual timesteps and separated attention, in student and teacher",
        _PAPER,
        reported="FID 1.44 guided, 4M steps",
        proof="sra_dts_as",
    ),
    **_NEIGHBOURS,
    **{f"{name}-dts-as": _with_both(name, entry) for name, entry in _NEIGHBOURS.items()},
    "imagenet256-xl2": Recipe(
        "sra-dts-as at the paper's full size: SiT-XL/2 on latents of 32×32, 4M steps of batch 256",
        {
            **_IMAGENET,
            **_XL,
            "model.image_size": (32, 32),
            "training.steps": 4_000_000,
            "data.root": "data/imagenet256",
        },
        needs="latents",
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
        needs="latents",
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
        needs="latents",
    ),
}


def nearest_recipe(config: RunConfig) -> str:
    """The recipe with the most settings that all hold in a tree."""

    def holds(name: str) -> bool:
        try:
            return override(config, RECIPES[name].settings) == config
        except UserError:
            return False

    return max(filter(holds, RECIPES), key=lambda name: len(RECIPES[name].settings))


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The config tree of a named recipe, with fields replaced by dotted name.

    Raises:
        UserError: no such recipe or field, or a combination that is not allowed.
    """
    if name not in RECIPES:
        raise UserError(f"recipe is {name!r}: allowed are {', '.join(RECIPES)}")
    return override(RunConfig(), {**RECIPES[name].settings, **(overrides or {})})

"""The controlled experiments of "From SRA to Self-Flow" (arXiv:2607.02508) as one grid.

The paper's figures are those of SiT-B/2 and SiT-XL/2 on ImageNet 256²: FID (lower is better) and
Inception Score (higher is better), without guidance but in the system table.
"""

from selfalign.study.grid import Effect, Grid, Row, Table, Variant

QUESTION = "Data augmentation or self-supervision?"
"""What the paper asks, and the title of a report on its grid."""

_RATIOS = (0.25, 0.35, 0.5)
_MIXING = 0.25


def _alpha(ratio: float) -> dict[str, tuple[float, float]]:
    return {"views.mask_ratios": (ratio, 1 - ratio)}


def _name(recipe: str, ratio: float, mixing: float = 0) -> str:
    """The recipes' own ratio is 0.25, and goes without saying."""
    name = recipe if ratio == _RATIOS[0] else f"{recipe}_alpha{ratio:g}"
    return f"{name}_rho{mixing:g}" if mixing else name


_VARIANTS = {
    **{name: Variant(name) for name in ("sit", "sra", "self-flow", "sra-dts", "sra-as")},
    "sra-dts-as": Variant("sra-dts-as"),
    **{
        _name(recipe, ratio): Variant(recipe, _alpha(ratio))
        for ratio in _RATIOS[1:]
        for recipe in ("sra-dts", "sra-dts-as")
    },
    **{
        _name("sra-dts-as", ratio, _MIXING): Variant(
            "sra-dts-as", {**_alpha(ratio), "views.whole_image_fraction": _MIXING}
        )
        for ratio in _RATIOS
    },
}


def _scores(*values: float) -> dict[str, float]:
    """FID and IS after 100K, 400K and 800K steps, as far as they are given, the last at 800K."""
    columns = [
        f"{metric} {steps}" for steps in ("100K", "400K", "800K") for metric in ("FID", "IS")
    ]
    return dict(zip(columns[-len(values) :], values, strict=True))


_FIRST_TABLE = Table(
    "Timesteps × attention",
    (
        Row(
            "sra",
            {"timesteps": "single", "attention": "full"},
            _scores(62.95, 22.26, 32.10, 50.34, 26.34, 63.86),
        ),
        Row(
            "sra-as",
            {"timesteps": "single", "attention": "separated"},
            _scores(62.39, 24.08, 32.45, 54.70, 25.81, 71.62),
        ),
        Row(
            "sra-dts",
            {"timesteps": "dual", "attention": "full"},
            _scores(58.16, 23.43, 30.20, 54.44, 25.19, 66.75),
        ),
        Row(
            "sra-dts-as",
            {"timesteps": "dual", "attention": "separated"},
            _scores(58.57, 25.20, 29.89, 58.29, 25.06, 72.94),
        ),
    ),
    "The paper's Tables 1 and 2 and Figure 4: each switch alone, and both.",
)

_PAPER_RATIOS = {
    ("sra-dts", 0.25): (25.19, 66.75),
    ("sra-dts-as", 0.25): (25.06, 72.94),
    ("sra-dts", 0.35): (24.87, 65.46),
    ("sra-dts-as", 0.35): (27.50, 68.12),
    ("sra-dts", 0.5): (24.39, 66.62),
    ("sra-dts-as", 0.5): (38.19, 67.20),
}

_MASK_RATIOS = Table(
    "Mask ratio × attention",
    tuple(
        Row(
            _name(recipe, ratio),
            {
                "mask ratio": f"{ratio:.2f}",
                "attention": "separated" if recipe == "sra-dts-as" else "full",
            },
            _scores(*figures),
        )
        for (recipe, ratio), figures in _PAPER_RATIOS.items()
    ),
    "The paper's Table 3, under dual timesteps.",
)

_WHOLE_IMAGES = Table(
    "Whole-image mixing",
    tuple(
        Row(
            _name("sra-dts-as", ratio, mixing),
            {"mask ratio": f"{ratio:.2f}", "whole images": f"{mixing:g}"},
            {"FID 800K": 24.15}
            if (ratio, mixing) == (0.5, _MIXING)
            else ({} if mixing else _scores(*_PAPER_RATIOS["sra-dts-as", ratio])),
        )
        for ratio in _RATIOS
        for mixing in (0, _MIXING)
    ),
    "The paper's Figure 5, with dual timesteps and separated attention: a share of each batch keeps one "
    "timestep and full attention.",
)

_METHODS = Table(
    "Methods",
    (
        Row("sit", {"method": "SiT"}, {"FID 7M, XL/2, guided": 2.06, "IS": 270.3}),
        Row("sra", {"method": "SRA"}, {"FID 4M, XL/2, guided": 1.58, "IS": 311.4}),
        Row("self-flow", {"method": "Self-Flow"}, {"FID 4M, XL/2, guided": 1.47, "IS": 305.4}),
        Row("sra-dts", {"method": "SRA + dual timesteps"}),
        Row("sra-as", {"method": "SRA + separated attention"}),
        Row(
            "sra-dts-as",
            {"method": "SRA + both (the paper's)"},
            {"FID 4M, XL/2, guided": 1.44, "IS": 315.3},
        ),
    ),
    "Every recipe beside the others; the paper's system table is of SiT-XL/2 with guidance.",
)

_FULL, _SEPARATED = ("sra-dts", "sra"), ("sra-dts-as", "sra-as")
DUAL_UNDER_FULL = "Dual timesteps, full attention"

EFFECTS = (
    Effect(
        DUAL_UNDER_FULL,
        "Do dual timesteps help where all tokens see each other?",
        (_FULL,),
        "Yes: dual timesteps augment the noise states that the model sees.",
    ),
    Effect(
        "Dual timesteps, separated attention",
        "Do they help where no token sees another noise level?",
        (_SEPARATED,),
        "Yes, as much: so it is no interaction between noise levels.",
    ),
    Effect(
        "Separation, single timestep",
        "With one noise level, does it help to separate attention?",
        (("sra-as", "sra"),),
        "Yes: tokens that see only a part of the image are augmented views of it.",
    ),
    Effect(
        "Separation, dual timesteps",
        "With two noise levels, is separated attention as good as full attention?",
        (("sra-dts-as", "sra-dts"),),
        "Equal: tokens of one noise level need not see those of the other.",
    ),
    Effect(
        "Cross-noise interaction",
        "Is the gain of dual timesteps larger where tokens see those of the other noise level?",
        (_FULL,),
        "No: the gain is that of augmented noise states, not of interaction between them.",
        minus=(_SEPARATED,),
        half_of=DUAL_UNDER_FULL,
    ),
)
"""The four simple effects and the difference of differences. Separation alone also costs, with one noise
level as with two; what it costs with one is no interaction, and subtracted."""

PAPER = Grid(
    name="paper",
    variants=_VARIANTS,
    tables=(_FIRST_TABLE, _MASK_RATIOS, _WHOLE_IMAGES, _METHODS),
    effects=EFFECTS,
    baseline="sit",
    separations=(("sra-as", "sra"), ("sra-dts-as", "sra-dts")),
)

CORNERS = ("sra", "sra-as", "sra-dts", "sra-dts-as")
SEPARATIONS = (("sra-as", "sra"), ("sra-dts-as", "sra-dts"))
TWO_BY_TWO = Grid(
    name="2x2",
    variants={name: _VARIANTS[name] for name in CORNERS},
    tables=(_FIRST_TABLE,),
    effects=EFFECTS,
    baseline="sra",
    separations=SEPARATIONS,
)
"""The four corners alone: with ten seeds, what the effects need."""

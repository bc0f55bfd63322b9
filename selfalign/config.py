"""A run is one tree of frozen dataclasses, and all of its validation lives here.

Each class checks what it can see on its own when it is made; `resolve` checks what depends on the
data's shape and fills in what was left to it. A resolved tree is what a run folder's `config.json`
holds, and it can be read back with `config_from_dict`.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from selfalign.errors import UserError
from selfalign.models.sizes import PATCH_SIZES, Size, parse_size


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{name} is {value!r}: {allowed}")


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    NoneType: "None",
}


def _fits(value: object, hint: Any) -> bool:
    """Whether a value has a field's type. True and False are not numbers here."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in choices
    if origin is UnionType:
        return any(_fits(value, choice) for choice in choices)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        hints = choices[:1] * len(value) if choices[-1] is Ellipsis else choices
        return len(value) == len(hints) and all(map(_fits, value, hints))
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint)


def _describe(hint: Any) -> str:
    """What a field's type allows, in words."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return ", ".join(choices)
    if get_origin(hint) is UnionType:
        return " or ".join(map(_describe, choices))
    if get_origin(hint) is tuple:
        many = choices[-1] is Ellipsis
        return "any number of: " * many + ", ".join(
            map(_describe, choices[:1] if many else choices)
        )
    return _KINDS.get(hint, f"a {hint.__name__}")


def _check_types(section: Any, prefix: str) -> None:
    """Refuse fields of another type than they declare, whoever made them; lists become tuples."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(section, name, value)
        _require(_fits(value, hint), prefix + name, value, f"allowed are {_describe(hint)}")


class _Section:
    """Refuses values outside a field's type, whoever makes the section."""

    _name = ""

    def __post_init__(self) -> None:
        _check_types(self, f"{self._name}.")
        self._check()

    def _check(self) -> None:
        """Checks of one section's numbers."""

    def _number(self, name: str, low: float, high: float, allowed: str) -> None:
        value = getattr(self, name)
        _require(
            math.isfinite(value) and low <= value <= high,
            f"{self._name}.{name}",
            value,
            f"allowed is {allowed}",
        )


@dataclass(frozen=True)
class FlowConfig(_Section):
    """Path and distribution of timesteps (Eq. 1 and 2)."""

    _name = "flow"

    path: Literal["linear", "cosine"] = "linear"
    """Path from data (t=0) to noise (t=1)."""
    timestep_distribution: Literal["uniform", "logit-normal"] = "uniform"
    """p(t), from which every token group's timestep is drawn."""
    logit_mean: float = 0.0
    """Mean of logit(t) under logit-normal."""
    logit_std: float = 1.0
    """Standard deviation of logit(t) under logit-normal."""

    def _check(self) -> None:
        self._number("logit_mean", -100, 100, "a finite number")
        self._number("logit_std", 1e-6, 100, "a number above 0")


@dataclass(frozen=True)
class ViewsConfig(_Section):
    """What the student sees: token groups, their timesteps, and who attends to whom (Eq. 5 to 9)."""

    _name = "views"

    timesteps: Literal["single", "dual"] = "single"
    """One timestep per image, or an independent one per token group."""
    attention: Literal["full", "separated"] = "full"
    """All tokens attend to each other, or only tokens of the same group do."""
    mask_ratios: tuple[float, ...] = (1.0,)
    """Share of the tokens in each group; one value a below 1 means the two groups a and 1-a."""
    whole_image_fraction: float = 0.0
    """Share of each batch that keeps one timestep and full attention (whole-image mixing, rho)."""
    class_dropout: float = 0.1
    """Probability that a sample's label is replaced by the null class."""

    def _check(self) -> None:
        ratios = self.mask_ratios
        _require(
            all(ratio > 0 for ratio in ratios) and 0 < sum(ratios) < math.inf,
            "views.mask_ratios",
            ratios,
            "allowed are one or more numbers above 0, a share per group",
        )
        if len(ratios) == 1:
            _require(
                ratios[0] <= 1,
                "views.mask_ratios",
                ratios,
                "a single ratio is allowed up to 1 (1: all tokens in one group)",
            )
            ratios = (1.0,) if ratios[0] == 1 else (ratios[0], 1 - ratios[0])
        # Ratios that add up to 1 stay as they are, so that reading a config back changes nothing.
        if not math.isclose(total := sum(ratios), 1, rel_tol=1e-9):
            ratios = tuple(ratio / total for ratio in ratios)
        object.__setattr__(self, "mask_ratios", ratios)
        self._number("whole_image_fraction", 0, 1, "a share from 0 to 1")
        self._number("class_dropout", 0, 1, "a probability from 0 to 1")
        groups = len(self.mask_ratios)
        for name, value in (("timesteps", "dual"), ("attention", "separated")):
            _require(
                groups > 1 or getattr(self, name) != value,
                f"views.{name}",
                value,
                f"needs two or more token groups, but views.mask_ratios is {self.mask_ratios}; "
                "allowed with one group: " + ("single" if name == "timesteps" else "full"),
            )
        _require(
            groups > 1 or self.whole_image_fraction == 0,
            "views.whole_image_fraction",
            self.whole_image_fraction,
            "allowed is 0 with one token group, where every image is whole already",
        )


@dataclass(frozen=True)
class AlignmentConfig(_Section):
    """The self-alignment loss and its teacher (Eq. 3, 4 and 7)."""

    _name = "alignment"

    target: Literal["none", "ema"] = "none"
    """What the student's features are aligned with: nothing, or the EMA teacher's later block."""
    weight: float = 0.5
    """Weight lambda of the alignment loss (Eq. 4)."""
    distance: Literal["cosine", "cosine-over-tokens", "smooth-l1", "l1", "l2"] = "cosine"
    """Distance of Eq. 3; cosine-over-tokens is what the released SRA code computes."""
    student_block: int | None = None
    """Student block m, counted from 1; left out: 0.3 of the model's depth."""
    teacher_block: int | None = None
    """Teacher block n, counted from 1; left out: 0.7 of the model's depth."""
    teacher_timestep: Literal["sra", "self-flow", "same"] = "sra"
    """sra: t - U(0, teacher_interval) per group; self-flow: min over groups; same: the student's."""
    teacher_interval: float = 0.2
    """Largest amount by which the sra teacher's timestep lies below the student's."""
    teacher_groups: bool = False
    """Whether the teacher sees the student's token groups (and separation), or the whole image."""
    teacher_labels: Literal["undropped", "dropped"] = "undropped"
    """Whether the teacher sees every label, or the student's label after class dropout."""

    def _check(self) -> None:
        self._number("weight", 0, math.inf, "a number from 0")
        self._number("teacher_interval", 0, 1, "a number from 0 to 1")
        for name in ("student_block", "teacher_block"):
            value = getattr(self, name)
            _require(
                value is None or value >= 1,
                f"alignment.{name}",
                value,
                "blocks are counted from 1",
            )


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The transformer (SiT). What is left out comes from the data."""

    _name = "model"

    size: str = "S/2"
    """Size and patch: tiny, S, B, L or XL, then /1, /2, /4 or /8."""
    channels: int | None = None
    """Channels C of the input; left out: the data's."""
    image_size: tuple[int, int] | None = None
    """Height and width of the input; left out: the data's."""
    num_classes: int | None = None
    """Number of classes; 0 trains an unconditional model; left out: the data's."""
    qk_norm: bool = False
    """Normalise queries and keys per head (LayerNorm)."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more arithmetic."""

    def _check(self) -> None:
        parse_size(self.size)
        _require(
            self.channels is None or self.channels >= 1,
            "model.channels",
            self.channels,
            "allowed is a number from 1",
        )
        _require(
            self.num_classes is None or self.num_classes >= 0,
            "model.num_classes",
            self.num_classes,
            "allowed is a number from 0 (0: unconditional)",
        )
        if self.image_size is not None:
            _require(
                min(self.image_size) >= 1,
                "model.image_size",
                self.image_size,
                "allowed are a height and a width from 1",
            )

    @property
    def dimensions(self) -> Size:
        """Width, depth and heads of the named size."""
        return parse_size(self.size)[0]

    @property
    def patch_size(self) -> int:
        """Side of a patch, in input pixels."""
        return parse_size(self.size)[1]

    @property
    def num_tokens(self) -> int:
        """Tokens N of an input, once its size is known."""
        assert self.image_size is not None, "resolve() fills in image_size"
        height, width = self.image_size
        return (height // self.patch_size) * (width // self.patch_size)


@dataclass(frozen=True)
class TrainingConfig(_Section):
    """Optimisation, and what a run writes while it goes on."""

    _name = "training"

    steps: int = 400_000
    """Optimizer steps in all."""
    batch_size: int = 256
    """Images per optimizer step, over all processes and accumulated micro-batches."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step and process."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a half cosine down to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average that is teacher and sampler."""
    ema_warmup: bool = True
    """Use min(decay, (1+step)/(10+step)), without which short runs keep their initial weights."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward passes; weights and optimizer stay float32."""
    compile: bool = False
    """Compile the objective with torch.compile."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 5_000
    """Steps between sample grids; 0: only at the end."""
    evaluate_every: int = 5_000
    """Steps between held-out denoising losses; 0: only at the end."""
    heldout_samples: int = 2_000
    """Pairs of a held-out image and a timestep in the held-out denoising loss."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints are kept."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""

    def _check(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "gradient_accumulation",
            "log_every",
            "heldout_samples",
            "keep_checkpoints",
        ):
            self._number(name, 1, math.inf, "a number from 1")
        for name in ("warmup_steps", "sample_every", "evaluate_every", "checkpoint_every"):
            self._number(name, 0, math.inf, "a number from 0")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            self._number(name, 0, math.inf, "a number from 0")
        self._number("ema_decay", 0, 1, "a number from 0 to 1")
        _require(
            all(0 <= beta < 1 for beta in self.adam_betas),
            "training.adam_betas",
            self.adam_betas,
            "allowed are two numbers from 0, below 1",
        )
        _require(
            self.batch_size % self.gradient_accumulation == 0,
            "training.gradient_accumulation",
            self.gradient_accumulation,
            f"must divide training.batch_size, which is {self.batch_size}",
        )
        _require(
            self.warmup_steps <= self.steps,
            "training.warmup_steps",
            self.warmup_steps,
            f"allowed is at most training.steps, which is {self.steps}",
        )


@dataclass(frozen=True)
class DataConfig(_Section):
    """The data set."""

    _name = "data"

    name: Literal["digits", "mnist", "fashion-mnist", "cifar10", "folder", "latents"] = "digits"
    """Which data set; folder reads class subfolders of images from data.root, and latents what
    `selfalign prepare` stored there."""
    root: str = "data"
    """Folder that holds the files, and into which they are downloaded where that is possible."""
    image_size: int = 64
    """Side of the square that a folder's images are cropped and resized to."""
    train_fraction: float = 1.0
    """Share of the training images that is used; a smaller share lies within every larger one."""
    flip: bool = False
    """Mirror training images at random, left to right; latents have to be prepared with --flip."""
    workers: int = 0
    """How many read ahead: processes that decode images, threads for latents; 0 reads in between."""

    def _check(self) -> None:
        self._number("image_size", 1, math.inf, "a number from 1")
        self._number("workers", 0, math.inf, "a number from 0")
        _require(
            0 < self.train_fraction <= 1,
            "data.train_fraction",
            self.train_fraction,
            "allowed is a share above 0, up to 1",
        )


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run."""

    seed: int = 0
    """Every random number of the run is a function of this seed."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        _check_types(self, "")
        views, alignment = self.views, self.alignment
        _require(
            0 <= self.seed < 2**63, "seed", self.seed, "allowed is a whole number from 0 to 2^63-1"
        )
        if alignment.target == "none":
            _require(
                not alignment.teacher_groups,
                "alignment.teacher_groups",
                True,
                "there is no teacher with alignment.target none; allowed is False",
            )
        if len(views.mask_ratios) > 1:
            _require(
                alignment.target == "none"
                or alignment.teacher_groups
                or alignment.teacher_timestep == "self-flow"
                or views.timesteps == "single",
                "alignment.teacher_timestep",
                alignment.teacher_timestep,
                "a teacher without groups sees one timestep, and dual timesteps offer several; "
                "allowed is self-flow, or alignment.teacher_groups True",
            )
        else:
            _require(
                not alignment.teacher_groups,
                "alignment.teacher_groups",
                True,
                "allowed is False with one token group",
            )
        depth = self.model.dimensions.depth
        blocks = {
            "student_block": alignment.student_block,
            "teacher_block": alignment.teacher_block,
        }
        for name, block in blocks.items():
            _require(
                block is None or block <= depth,
                f"alignment.{name}",
                block,
                f"allowed is 1 to {depth}, the depth of model.size {self.model.size}",
            )

    @property
    def num_groups(self) -> int:
        """Token groups K."""
        return len(self.views.mask_ratios)


def group_sizes(mask_ratios: tuple[float, ...], num_tokens: int) -> tuple[int, ...]:
    """Tokens per group: shares of `num_tokens` rounded down, the largest fractions take the rest.

    Args:
        mask_ratios: normalised share of each of the K groups.
        num_tokens: tokens N of an image.

    Returns:
        K counts that sum to N.
    """
    expected = [ratio * num_tokens for ratio in mask_ratios]
    sizes = [math.floor(share) for share in expected]
    by_fraction = sorted(range(len(sizes)), key=lambda k: (sizes[k] - expected[k], k))
    for k in by_fraction[: num_tokens - sum(sizes)]:
        sizes[k] += 1
    return tuple(sizes)


def whole_images(fraction: float, batch_size: int) -> int:
    """How many of a batch's images stay whole: the nearest number, and the even one between two."""
    return round(fraction * batch_size)


def resolve(
    config: RunConfig,
    channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    processes: int = 1,
) -> RunConfig:
    """Fill in what was left open, and check what depends on the data's shape.

    Args:
        config: a tree whose model section may leave shapes open.
        channels, image_size, num_classes: the data's; where they are left out, the model section has
            to give them.
        processes: how many share each batch.

    Returns:
        A tree without open fields.

    Raises:
        UserError: the model does not fit the data, or a token group or the part of whole images would
            be empty.
    """
    model, data = config.model, {"channels": channels, "image_size": image_size}
    for name, value in data.items():
        given = getattr(model, name)
        _require(given is not None or value is not None, f"model.{name}", given, "must be given")
        _require(
            given is None or value is None or given == value,
            f"model.{name}",
            given,
            f"the data has {value}",
        )
    _require(
        num_classes is None or model.num_classes in (None, 0) or model.num_classes >= num_classes,
        "model.num_classes",
        model.num_classes,
        f"the data has {num_classes} classes; allowed is at least that, or 0 (unconditional)",
    )
    model = dataclasses.replace(
        model,
        channels=model.channels or channels,
        image_size=model.image_size or image_size,
        num_classes=num_classes if model.num_classes is None else model.num_classes,
    )
    _require(model.num_classes is not None, "model.num_classes", None, "must be given")
    assert model.image_size is not None
    height, width = model.image_size
    fitting = [f"/{p}" for p in PATCH_SIZES if height % p == width % p == 0]
    _require(
        f"/{model.patch_size}" in fitting,
        "model.size",
        model.size,
        f"its patch must divide the input of {height}×{width}; allowed are patches "
        + ", ".join(fitting),
    )
    sizes = group_sizes(config.views.mask_ratios, model.num_tokens)
    _require(
        min(sizes) >= 1,
        "views.mask_ratios",
        config.views.mask_ratios,
        f"of the {model.num_tokens} tokens the groups get {sizes}; every group needs at least one",
    )
    fraction, training = config.views.whole_image_fraction, config.training
    images = training.batch_size // (processes * training.gradient_accumulation)
    _require(
        fraction == 0 or whole_images(fraction, images) > 0,
        "views.whole_image_fraction",
        fraction,
        f"of the {images} images that a process sees at once this rounds to none; allowed are 0, a "
        "larger share, or a larger training.batch_size",
    )
    alignment = config.alignment
    depth = model.dimensions.depth
    alignment = dataclasses.replace(
        alignment,
        student_block=alignment.student_block or max(1, round(0.3 * depth)),
        teacher_block=alignment.teacher_block or max(1, round(0.7 * depth)),
    )
    return dataclasses.replace(config, model=model, alignment=alignment)


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A copy of the tree with fields replaced by dotted name, as in `{"model.size": "S/2"}`.

    Raises:
        UserError: a name is not a field of the tree, or the result is not allowed.
    """
    sections: dict[str, dict[str, Any]] = {}
    changes: dict[str, Any] = {}
    for dotted, value in values.items():
        section, dot, name = dotted.partition(".")
        parent = getattr(config, section, None) if dot else config
        known = (
            {f.name for f in dataclasses.fields(parent)} if dataclasses.is_dataclass(parent) else ()
        )
        _require((name if dot else section) in known, "config field", dotted, "no such field")
        if dot:
            sections.setdefault(section, {})[name] = value
        else:
            changes[section] = value
    for section, fields in sections.items():
        changes[section] = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **changes)


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The tree as nested dictionaries that JSON can hold."""
    return dataclasses.asdict(config)


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The tree that `config_to_dict` wrote, also by way of JSON.

    Raises:
        UserError: a field is unknown (written by another version), or a value is not allowed.
    """
    flat: dict[str, Any] = {}
    for section, fields in values.items():
        if isinstance(fields, Mapping):
            for name, value in fields.items():
                flat[f"{section}.{name}"] = value
        else:
            flat[section] = fields
    return override(RunConfig(), flat)

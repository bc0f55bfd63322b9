"""The sections of a config tree: each checks what it can see on its own when it is made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from selfalign.parts import Choosing, PartSettings, chosen, get
from selfalign.settings import Settings, require
from selfalign.tokens import TokenGrid

PATCH_SIZES = (1, 2, 4, 8)
# Sizes are bounded before memory is asked for; far beyond what anybody has trained.
MAX_CHANNELS = 2**12
MAX_CLASSES = 10**6
MAX_SIDE = 2**14
MAX_TOKENS = 2**20
MAX_BATCH = 2**20
MAX_PROCESSES = 2**10
MAX_SAMPLES = 10**8
MAX_COUNT = 10**12


def check_colour(name: str, colour: str) -> None:
    """Refuse what is no opaque colour's name or number."""
    if colour == "white":
        return  # what nearly all settings say needs no look at Pillow's colours
    from PIL import ImageColor

    try:
        opaque = len(ImageColor.getrgb(colour)) == 3
    except ValueError:
        opaque = False
    require(opaque, name, colour, "allowed is a colour's name, or #rrggbb")


@dataclass(frozen=True)
class FlowConfig(Settings):
    """Path and distribution of timesteps (Eq. 1 and 2)."""

    section = "flow"

    path: Literal["linear", "cosine"] = "linear"
    """Path from data (t=0) to noise (t=1)."""
    timestep_distribution: Literal["uniform", "logit-normal"] = "uniform"
    """p(t), from which every token group's timestep is drawn."""
    logit_mean: float = 0.0
    """Mean of logit(t) under logit-normal."""
    logit_std: float = 1.0
    """Standard deviation of logit(t) under logit-normal."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("logit_mean", -100, 100, "a finite number")
        self.require_number("logit_std", 1e-6, 100, "a number above 0")


@dataclass(frozen=True)
class ViewsConfig(Choosing):
    """What the student sees: token groups, their timesteps, and who attends to whom (Eq. 5 to 9)."""

    section = "views"

    timesteps: str = chosen("schedule", "single")
    """Schedule of timesteps: single, one per image; independent (dual), one per token group."""
    attention: Literal["full", "separated"] = "full"
    """All tokens attend to each other, or only tokens of the same group do."""
    partition: str = chosen("partition", "random")
    """Which tokens are together in a group."""
    mask_ratios: tuple[float, ...] = (1.0,)
    """Share of the tokens in each group; one value a below 1 means the two groups a and 1-a."""
    whole_image_fraction: float = 0.0
    """Share of each batch that keeps one timestep and full attention (whole-image mixing, rho)."""
    curriculum: str = chosen("curriculum", "constant")
    """How partition, mask ratios and whole images change while a run goes on."""
    hidden_groups: int = 0
    """How many groups, counted from the last, the student does not see, or only in part (skipped_blocks);
    a teacher without groups sees them."""
    skipped_blocks: tuple[int, int] | None = None
    """First and last block that the hidden groups pass by unchanged (TREAD); left out: they are dropped."""
    hidden_as: Literal["tokens", "mask"] = "tokens"
    """What the other blocks see of them: their tokens, or a learned mask token at their places (MaskDiT)."""
    class_dropout: float = 0.1
    """Probability that a sample's label is replaced by the null class."""

    def check(self) -> None:
        """Normalise the ratios, and limits of the numbers."""
        ratios = self.mask_ratios
        self.require(
            all(ratio > 0 for ratio in ratios) and 0 < sum(ratios) < math.inf,
            "mask_ratios",
            "allowed are one or more numbers above 0, a share per group",
        )
        if len(ratios) == 1:
            self.require(
                ratios[0] <= 1,
                "mask_ratios",
                "a single ratio is allowed up to 1 (1: all tokens in one group)",
            )
            ratios = (1.0,) if ratios[0] == 1 else (ratios[0], 1 - ratios[0])
        # Ratios that add up to 1 stay as they are, so that reading a config back changes nothing.
        if not math.isclose(total := sum(ratios), 1, rel_tol=1e-9):
            ratios = tuple(ratio / total for ratio in ratios)
        object.__setattr__(self, "mask_ratios", ratios)
        self.require_number("whole_image_fraction", 0, 1, "a share from 0 to 1")
        self.require_number("class_dropout", 0, 1, "a probability from 0 to 1")
        several = len(self.mask_ratios) > 1
        needed = f"needs two or more token groups, but views.mask_ratios is {self.mask_ratios}; "
        single = get("schedule", self.timesteps, self.dotted("timesteps")).one_per_sample
        self.require(several or single, "timesteps", f"{needed}allowed with one group: single")
        full = self.attention == "full"
        self.require(several or full, "attention", f"{needed}allowed with one group: full")
        self.require(
            several or self.whole_image_fraction == 0,
            "whole_image_fraction",
            "allowed is 0 with one token group, where every image is whole already",
        )
        self._check_hidden()

    @property
    def drops_groups(self) -> bool:
        """Whether hidden groups are not seen by the student at all."""
        return self.hidden_groups > 0 and self.skipped_blocks is None

    def require_all_tokens(self, part: Settings) -> None:
        """Refuse a part that needs every token's features, where some are dropped."""
        self.require(
            not self.drops_groups,
            "hidden_groups",
            f"{part.section} needs all tokens; allowed is 0 with it",
        )

    def _check_hidden(self) -> None:
        """Limits of what the student does not see."""
        self.require(
            0 <= self.hidden_groups < len(self.mask_ratios),
            "hidden_groups",
            f"allowed is 0, or fewer than the {len(self.mask_ratios)} of views.mask_ratios",
        )
        self.require(
            self.hidden_groups == 0 or self.whole_image_fraction == 0,
            "hidden_groups",
            "allowed is 0 with whole images, which the student sees whole",
        )
        skipped = self.skipped_blocks
        self.require(
            skipped is None or 1 <= skipped[0] <= skipped[1],
            "skipped_blocks",
            "allowed are the first and the last one, counted from 1",
        )
        self.require(
            skipped is None or self.hidden_groups > 0,
            "skipped_blocks",
            "no group is hidden: views.hidden_groups says how many are",
        )
        self.require(
            self.hidden_as == "tokens" or skipped is not None,
            "hidden_as",
            "allowed is tokens without views.skipped_blocks",
        )


@dataclass(frozen=True)
class ObjectiveConfig(Choosing):
    """Which losses are minimised besides denoising, and alignment where it has a target."""

    section = "objective"

    terms: tuple[str, ...] = chosen("term", ())
    """Further terms, each with its settings under --terms.NAME."""

    def check(self) -> None:
        """A term is there once: its weight says how much of it."""
        self.require(len(set(self.terms)) == len(self.terms), "terms", "allowed is each name once")


@dataclass(frozen=True)
class ModelConfig(Choosing):
    """The transformer. What is left out comes from the data."""

    section = "model"

    backbone: str = chosen("backbone", "sit")
    """Which transformer."""
    size: str = "S/2"
    """Size and patch: tiny, S, B, L, XL, 2B, 5B or 10B, then /1, /2, /4 or /8."""
    condition: str = chosen("condition", "label")
    """What a sample is conditioned on."""
    channels: int | None = None
    """Channels C of the input; left out: the data's."""
    image_size: tuple[int, ...] | None = None
    """Height and width of the input; left out: the data's."""
    num_classes: int | None = None
    """Number of classes; 0 trains an unconditional model; left out: the data's."""
    qk_norm: bool = False
    """Normalise queries and keys per head (LayerNorm)."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more arithmetic."""
    checkpointing: Literal["blocks", "alternate"] = "blocks"
    """What is recomputed then: every block, or every second one."""

    def check(self) -> None:
        """Limits of the shapes."""
        self.require(
            self.channels is None or 1 <= self.channels <= MAX_CHANNELS,
            "channels",
            f"allowed is a number from 1 to {MAX_CHANNELS}",
        )
        self.require(
            self.num_classes is None or 0 <= self.num_classes <= MAX_CLASSES,
            "num_classes",
            f"allowed is a number from 0 (unconditional) to {MAX_CLASSES}",
        )
        sides = (1, 1) if self.image_size is None else self.image_size
        self.require(
            1 <= len(sides) <= 3 and all(1 <= side <= MAX_SIDE for side in sides),
            "image_size",
            f"allowed are a height and a width from 1 to {MAX_SIDE}; one length for signals, frames "
            "before them for videos",
        )

    @property
    def patch_size(self) -> int:
        """Side of a patch, in input pixels."""
        return int(self.size.rpartition("/")[2]) if "/" in self.size else 1


@dataclass(frozen=True)
class ResolvedModel(ModelConfig):
    """The transformer's section once the data is known: nothing is left out."""

    channels: int = 0
    image_size: tuple[int, ...] = ()
    num_classes: int = 0

    @property
    def grid(self) -> TokenGrid:
        """How a sample is cut into tokens."""
        return TokenGrid(self.image_size, self.patch_size)

    @property
    def num_tokens(self) -> int:
        """Tokens N of a sample."""
        return self.grid.num_tokens


@dataclass(frozen=True)
class TrainingConfig(Choosing):
    """Optimisation, and what a run writes while it goes on."""

    section = "training"

    steps: int = 400_000
    """Optimizer steps in all."""
    batch_size: int = 256
    """Images per optimizer step, over all processes and accumulated micro-batches."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step and process."""
    start_from: str | None = None
    """Folder of a run whose last weights, EMA included, this one starts from, or a released checkpoint
    (also: --init); what does not fit the model begins anew. Left out: drawn anew."""
    start_weights: Literal["both", "ema", "raw"] = "both"
    """Which of them: both as they are, or the average or the trained ones for both."""
    optimizer: str = chosen("optimizer", "adamw")
    """What moves the weights."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a half cosine down to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    ema_decay: float | tuple[float, ...] = 0.9999
    """Decay of the exponential moving average that is teacher and sampler; further decays keep further
    averages, from which can be sampled (--weights ema:DECAY)."""
    ema_warmup: bool = True
    """Use min(decay, (1+step)/(10+step)), without which short runs keep their initial weights."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward passes; weights and optimizer stay float32."""
    tf32: bool = True
    """Multiply float32 matrices on NVIDIA GPUs in TF32, as the released code does: several times as fast,
    with 10 bits of mantissa in the factors."""
    sharding: Literal["none", "gradients", "full"] = "none"
    """What processes hold: none, everything each; gradients: their shares of gradients, moments and averages,
    and of the weights between steps; full: of the weights always, a block at a time being gathered."""
    on_nonfinite: str = "stop"
    """What a loss or gradient that is not finite does: stop, or skip:N, which leaves out up to N such
    steps in a row."""
    compile: bool = False
    """Compile with torch.compile."""
    compile_region: Literal["auto", "blocks", "objective"] = "auto"
    """What is compiled as one: a block, which is compiled once for all of its kind, so that depth costs no
    time; or the whole objective, whose step is a little faster; auto: the objective, but blocks where there
    are more than 12, or shards."""
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

    def check(self) -> None:
        """Limits of the numbers."""
        for name in (
            "steps",
            "gradient_accumulation",
            "log_every",
            "keep_checkpoints",
        ):
            self.require_number(name, 1, MAX_COUNT, f"a number from 1 to {MAX_COUNT}")
        self.require_number("heldout_samples", 1, MAX_SAMPLES, f"a number from 1 to {MAX_SAMPLES}")
        for name in ("warmup_steps", "sample_every", "evaluate_every", "checkpoint_every"):
            self.require_number(name, 0, MAX_COUNT, f"a number from 0 to {MAX_COUNT}")
        self.require_number("batch_size", 1, MAX_BATCH, f"a number from 1 to {MAX_BATCH}")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            self.require_number(name, 0, math.inf, "a number from 0")
        decays = self.ema_decays
        self.require(
            len(decays) > 0 and all(0 <= decay <= 1 for decay in decays),
            "ema_decay",
            "allowed is a number from 0 to 1, or several",
        )
        self.require(len(set(decays)) == len(decays), "ema_decay", "one stands there twice")
        self.require(
            re.fullmatch(r"stop|skip:[1-9]\d{0,8}", self.on_nonfinite) is not None,
            "on_nonfinite",
            "allowed are stop and skip:N, with a number N from 1 of steps in a row",
        )
        self.require(
            all(0 <= beta < 1 for beta in self.adam_betas),
            "adam_betas",
            "allowed are two numbers from 0, below 1",
        )
        self.require(
            self.batch_size % self.gradient_accumulation == 0,
            "gradient_accumulation",
            f"must divide training.batch_size, which is {self.batch_size}",
        )
        self.require(
            self.warmup_steps <= self.steps,
            "warmup_steps",
            f"allowed is at most training.steps, which is {self.steps}",
        )

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """Of all averages; the first one's is teacher and sampler."""
        decays = self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)
        return tuple(map(float, decays))

    @property
    def nonfinite_allowed(self) -> int:
        """How many steps in a row may be left out."""
        return int(self.on_nonfinite.partition(":")[2] or 0)


@dataclass(frozen=True)
class DataConfig(Choosing):
    """The data set."""

    section = "data"

    name: str = chosen("source", "digits")
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
    background: str = "white"
    """Colour behind a folder's images where they are transparent: a name, or #rrggbb."""
    skip_unreadable: bool = False
    """Leave out a folder's images that cannot be read, with a warning, instead of stopping."""
    workers: int = 0
    """How many read ahead: processes that decode images, threads for latents; 0 reads in between."""
    sources: PartSettings = field(default_factory=partial(PartSettings, "source"))
    """Settings of data sources, by name."""

    @property
    def source(self) -> Any:
        """What opens the data set (a `Source`)."""
        return self.sources[self.name]

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("image_size", 1, MAX_SIDE, f"a number from 1 to {MAX_SIDE}")
        self.require_number("workers", 0, MAX_PROCESSES, f"a number from 0 to {MAX_PROCESSES}")
        self.require(
            0 < self.train_fraction <= 1, "train_fraction", "allowed is a share above 0, up to 1"
        )
        check_colour("data.background", self.background)

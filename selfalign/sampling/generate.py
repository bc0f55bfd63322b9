"""Numbered sets of samples: sample i is a function of (seed, i), whatever the batch size."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from selfalign.errors import UserError
from selfalign.flow import PATHS
from selfalign.memory import keep_freed_memory
from selfalign.models.sit import SiT
from selfalign.randomness import make_generator
from selfalign.sampling.guidance import Guidance, GuidedModel
from selfalign.sampling.solvers import solve_ode, solve_sde
from selfalign.views import TokenGroups


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are made."""

    solver: Literal["euler", "heun", "sde"] = "euler"
    """Euler or Heun for the ODE, Euler-Maruyama for the SDE."""
    steps: int = 50
    """Solver steps; the papers report 250 with sde."""
    guidance_scale: float = 1.0
    """Strength of classifier-free guidance; 1 is off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance applies to steps that start at a t within these bounds."""
    mask_ratio: float = 0.0
    """Share of tokens in the first of two groups that separate attention; 0: whole images."""
    mask_type: Literal["fixed", "per-step"] = "fixed"
    """Whether those groups are drawn once per sample or at every step."""
    seed: int = 0
    """Sample i is a function of this seed and i."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}: allowed is a number from 1")
        if not 0 <= self.mask_ratio < 1:
            raise UserError(f"mask_ratio is {self.mask_ratio}: allowed is 0 (off) to below 1")
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale is {self.guidance_scale}: allowed is 1 (off) or more")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: allowed is a whole number from 0")
        Guidance(self.guidance_scale, self.guidance_interval)


@dataclass(frozen=True)
class Samples:
    """A part of a numbered set, in the model's space."""

    indices: range
    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, "B"]


def random_labels(num_classes: int, seed: int, indices: Sequence[int]) -> Int[Tensor, "B"]:
    """A uniformly drawn class per sample: a function of (seed, i). Zeros where there are no classes."""
    if num_classes == 0:
        return torch.zeros(len(indices), dtype=torch.int64)
    draws = [
        torch.randint(num_classes, (1,), generator=make_generator(seed, "sample label", i))
        for i in indices
    ]
    return torch.cat(draws)


def check_sampling(
    model: SiT, config: SamplingConfig, class_dropout: float, labels: Sequence[int] | None
) -> None:
    """Refuse what cannot be sampled from a model, before any work is done.

    Raises:
        UserError: guidance without a null class, labels the model does not have, or an empty group.
    """
    if config.guidance_scale > 1 and (model.num_classes == 0 or class_dropout == 0):
        raise UserError(
            f"guidance_scale is {config.guidance_scale}: the model was trained without dropped "
            "labels and has no unguided direction; allowed is 1"
        )
    if labels is not None:
        known = f"0 to {model.num_classes - 1}" if model.num_classes else "none (unconditional)"
        wrong = [label for label in labels if not 0 <= label < model.num_classes]
        if wrong or not labels:
            raise UserError(f"labels are {list(labels)}: the model's classes are {known}")
    if config.mask_ratio and not 1 <= int(model.num_tokens * config.mask_ratio) < model.num_tokens:
        raise UserError(
            f"mask_ratio is {config.mask_ratio}: leaves a group of the {model.num_tokens} tokens empty"
        )


def generate(
    model: SiT,
    path: str,
    config: SamplingConfig,
    num: int,
    *,
    batch_size: int,
    labels: Sequence[int] | None = None,
    first: int = 0,
    separate: bool = True,
) -> Iterator[Samples]:
    """Make samples first to first+num-1, a batch at a time.

    Args:
        model: the network, in eval mode.
        path: name of the path it was trained on.
        config: solver, guidance and seed.
        num: how many samples.
        batch_size: how many at once; has no effect on any sample but for float rounding.
        labels: given classes, repeated in order over the set's numbers; None draws them.
        first: number of the first sample.
        separate: whether sampling with groups separates their attention, as the model was trained.
    """
    device = model.pos_embed.device
    if device.type == "cpu":
        keep_freed_memory()
    shape = (model.channels, *model.image_size)
    for start in range(first, first + num, batch_size):
        indices = range(start, min(start + batch_size, first + num))
        chosen = (
            random_labels(model.num_classes, config.seed, indices)
            if labels is None
            else torch.tensor([labels[i % len(labels)] for i in indices])
        )
        # Drawn on the CPU, so that a sample is the same on every kind of device.
        generators = [make_generator(config.seed, "sample", i) for i in indices]

        def draw(
            generators: Sequence[torch.Generator] = generators,
        ) -> Float[Tensor, "B C H W"]:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

        guided = GuidedModel(
            model,
            chosen.to(device),
            model.null_label,
            Guidance(config.guidance_scale, config.guidance_interval),
            _sampling_groups(config, model, indices, separate) if config.mask_ratio else None,
        )
        if config.solver == "sde":
            images = solve_sde(
                guided, draw(), config.steps, path=PATHS[path], step_noise=lambda step: draw()
            )
        else:
            images = solve_ode(guided, draw(), config.steps, heun=config.solver == "heun")
        yield Samples(indices, images.float(), chosen)


def _sampling_groups(
    config: SamplingConfig, model: SiT, indices: Sequence[int], separate: bool
) -> Callable[[int], TokenGroups]:
    """Two token groups per sample, drawn once or per step, as the released SDE sampler has them."""
    device, tokens = model.pos_embed.device, model.num_tokens
    first = int(tokens * config.mask_ratio)

    def groups(step: int) -> TokenGroups:
        drawn_at = 0 if config.mask_type == "fixed" else step
        order = torch.stack(
            [
                torch.randperm(tokens, generator=make_generator(config.seed, "groups", i, drawn_at))
                for i in indices
            ]
        )
        return TokenGroups(order.to(device), (first, tokens - first), separate=separate)

    return groups


def to_uint8(images: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
    """Images in [-1, 1] as bytes, clamped and rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

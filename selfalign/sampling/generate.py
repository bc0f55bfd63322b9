"""Numbered sets of samples: sample i is a function of (seed, i), whatever the batch size."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfalign.errors import UserError
from selfalign.flow import PATHS
from selfalign.memory import keep_freed_memory
from selfalign.network import EARLY_VELOCITY, Backbone
from selfalign.randomness import make_generator
from selfalign.sampling.guidance import GuidedModel
from selfalign.sampling.settings import SamplingConfig
from selfalign.sampling.solvers import StepVelocity, Velocity
from selfalign.tokens import TokenGroups, group_sizes

LABEL_BYTES = 8
"""Of a sample's label in a file."""


@dataclass(frozen=True)
class Samples:
    """A part of a numbered set, in the model's space."""

    indices: range
    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, "B"]


Watch = Callable[[range, int, Float[Tensor, "B C H W"]], None]
"""Told of samples' numbers, of the step that they begin, and of their state."""


def random_labels(num_classes: int, seed: int, indices: Sequence[int]) -> Int[Tensor, "B"]:
    """A uniformly drawn class per sample: a function of (seed, i). Zeros where there are no classes."""
    if num_classes == 0:
        return torch.zeros(len(indices), dtype=torch.int64)
    draws = [
        torch.randint(num_classes, (1,), generator=make_generator(seed, "sample label", i))
        for i in indices
    ]
    return torch.cat(draws)


def balanced_labels(num_classes: int, indices: Sequence[int]) -> Int[Tensor, "B"]:
    """Class i mod num_classes for sample i: exactly balanced over every multiple of num_classes."""
    return torch.tensor([i % num_classes for i in indices])


Labels = Literal["random", "balanced"] | Sequence[int]
"""Which classes samples have: drawn, balanced, or given ones, repeated in order."""


def sample_labels(
    labels: Labels | None, num_classes: int, seed: int, indices: Sequence[int]
) -> Int[Tensor, "B"]:
    """The class of each of the samples of these numbers; None draws them."""
    if labels is None or labels == "random":
        return random_labels(num_classes, seed, indices)
    if labels == "balanced":
        return balanced_labels(num_classes, indices)
    return torch.tensor([labels[i % len(labels)] for i in indices])


def check_sampling(
    model: Backbone, config: SamplingConfig, class_dropout: float, labels: Labels | None
) -> None:
    """Refuse what cannot be sampled from a model, before any work is done.

    Raises:
        UserError: guidance without a null class, labels the model does not have, or an empty group.
    """
    solver = config.make_solver()
    if solver.predicts != model.predicts:
        fitting = [
            name for name in config.solvers if config.solvers[name].predicts == model.predicts
        ]
        raise UserError(
            f"solver is {config.solver!r}, which needs a model of {solver.predicts}, and this one predicts "
            f"{model.predicts}: allowed are {', '.join(fitting)}"
        )
    if config.guidance_scale > 1 and (model.num_classes == 0 or class_dropout == 0):
        raise UserError(
            f"guidance_scale is {config.guidance_scale}: the model was trained without dropped "
            "labels and has no unguided direction; allowed is 1"
        )
    if config.internal_guidance_scale > 1 and EARLY_VELOCITY not in model.head_taps:
        raise UserError(
            f"internal_guidance_scale is {config.internal_guidance_scale}: the model was trained without "
            "the term early-velocity and has no second velocity; allowed is 1"
        )
    if labels == "balanced" and not model.num_classes:
        raise UserError("labels are balanced: the model's classes are none (unconditional)")
    if labels is not None and not isinstance(labels, str):
        known = f"0 to {model.num_classes - 1}" if model.num_classes else "none (unconditional)"
        wrong = [label for label in labels if not 0 <= label < model.num_classes]
        if wrong or not labels:
            raise UserError(f"labels are {list(labels)}: the model's classes are {known}")
    if config.mask_ratio and not all(_sampling_sizes(config, model)):
        raise UserError(
            f"mask_ratio is {config.mask_ratio}: leaves a group of the {model.num_tokens} tokens empty"
        )


def generate(
    model: Backbone,
    path: str,
    config: SamplingConfig,
    num: int,
    *,
    batch_size: int,
    labels: Labels | None = None,
    first: int = 0,
    separate: bool = True,
    lengths: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> Iterator[Samples]:
    """Make samples first to first+num-1, a batch at a time.

    Args:
        model: the network, in eval mode.
        path: name of the path it was trained on.
        config: solver, guidance and seed.
        num: how many samples.
        batch_size: how many at once; has no effect on any sample but for float rounding.
        labels: `random`, `balanced`, or given classes, repeated in order over the set's numbers; None
            draws them.
        first: number of the first sample.
        separate: whether sampling with groups separates their attention, as the model was trained.
        lengths: of the samples along their first side, repeated in order; beyond them is NaN. None: all
            are as long as can be.
        watch: told of every step of every batch.

    Raises:
        UserError: a sample is not finite.
    """
    device = model.device
    if device.type == "cpu":
        keep_freed_memory()
    shape = (model.channels, *model.image_size)
    for start in range(first, first + num, batch_size):
        indices = range(start, min(start + batch_size, first + num))
        chosen = sample_labels(labels, model.num_classes, config.seed, indices)
        # Drawn on the CPU, so that a sample is the same on every kind of device.
        generators = [make_generator(config.seed, "sample", i) for i in indices]

        def draw(
            generators: Sequence[torch.Generator] = generators,
        ) -> Float[Tensor, "B C H W"]:
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

        groups, ends = None, None
        if config.mask_ratio:
            groups = _sampling_groups(config, model, indices, separate)
        elif lengths is not None:
            ends = torch.tensor([lengths[i % len(lengths)] for i in indices], device=device)
            groups = _lengths(model, ends)
        there = None
        if ends is not None:
            places = torch.arange(shape[1], device=device).view(1, 1, -1, *[1] * (len(shape) - 2))
            there = places < ends.view(-1, *[1] * len(shape))
        images = _solve(
            model,
            path,
            config,
            draw(),
            chosen,
            groups,
            lambda step: draw(),
            None if watch is None else functools.partial(watch, indices),
            there,
        )
        if not bool(images.isfinite().all()):
            raise UserError(
                f"samples {indices.start} to {indices.stop - 1} are not finite: the model has diverged, or "
                f"is guided too strongly (guidance_scale is {config.guidance_scale:g})"
            )
        if there is not None:
            images = images.masked_fill(~there, torch.nan)
        yield Samples(indices, images, chosen)


def interpolate(
    model: Backbone,
    path: str,
    config: SamplingConfig,
    pairs: Sequence[tuple[int, int, int]],
    count: int,
    separate: bool = True,
) -> Float[Tensor, "B K C H W"]:
    """From every sample to another one: the noise goes along a great circle, the class stays.

    Args:
        model, path, config, separate: as for `generate`.
        pairs: numbers of two samples of `generate` with the same settings, and a class.
        count: images K from one to the other, both included.
    """
    shape = (model.channels, *model.image_size)
    shares = torch.linspace(0, 1, count)
    rows = []
    for a, b, label in pairs:
        own = make_generator(config.seed, "sample", a)
        start = torch.randn(shape, generator=own)
        end = torch.randn(shape, generator=make_generator(config.seed, "sample", b))
        noise = torch.stack([slerp(start, end, float(share)) for share in shares])

        def same_noise(step: int, own: torch.Generator = own) -> Float[Tensor, "K C H W"]:
            drawn: Tensor = torch.randn(shape, generator=own)
            return drawn.expand(count, *shape).to(model.device)

        labels, groups = torch.full((count,), label), None
        if config.mask_ratio:  # those of the first along the whole row
            groups = _sampling_groups(config, model, [a] * count, separate)
        rows.append(_solve(model, path, config, noise, labels, groups, same_noise))
    return torch.stack(rows)


def slerp(
    start: Float[Tensor, "*shape"], end: Float[Tensor, "*shape"], share: float
) -> Float[Tensor, "*shape"]:
    """Between two draws of noise along a great circle, so that what lies between is as long as they are."""
    cosine = torch.dot(start.flatten(), end.flatten()) / (start.norm() * end.norm())
    angle = cosine.clamp(-1, 1).acos()
    if angle < 1e-4:
        return torch.lerp(start, end, share)
    return (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()


def _solve(
    model: Backbone,
    path: str,
    config: SamplingConfig,
    noise: Float[Tensor, "B C H W"],
    labels: Int[Tensor, "B"],
    groups: Callable[[int], TokenGroups] | None,
    step_noise: Callable[[int], Tensor],
    watch: Callable[[int, Tensor], None] | None = None,
    there: Bool[Tensor, "B 1 *#sides"] | None = None,
) -> Float[Tensor, "B C H W"]:
    """Samples from noise. Arguments as for `generate`, `GuidedModel` and `Solver.solve`.

    Args:
        there: which values of a sample are there, where it ends early; None: all.
    """
    device, solver = model.device, config.make_solver()
    condition = labels.to(device)
    guided: StepVelocity = GuidedModel(
        model,
        condition,
        model.condition.null(condition, model.num_classes),
        config.guidance,
        groups,
        config.internal_guidance,
        solver.predicts,
    )
    if there is not None:
        guided = _Ending(guided, there)
    if watch is not None:
        guided = _Watched(guided, watch)
    # MPS has no float64.
    noise = noise.to(device, torch.float32 if device.type == "mps" else torch.float64)
    with torch.no_grad():
        return solver.solve(guided, noise, config.steps, PATHS[path], step_noise).float()


@dataclass(frozen=True)
class _Ending:
    """Velocities of samples that end early: beyond their end the model sees zeros, as in training."""

    inner: StepVelocity
    there: Tensor

    def at(self, step: int, t_start: float) -> Velocity:
        """See `StepVelocity.at`."""
        velocity = self.inner.at(step, t_start)
        return lambda x, t: velocity(x.masked_fill(~self.there, 0), t)


@dataclass(frozen=True)
class _Watched:
    """Velocities of which the first call of every step is told."""

    inner: StepVelocity
    watch: Callable[[int, Tensor], None]

    def at(self, step: int, t_start: float) -> Velocity:
        """See `StepVelocity.at`."""
        velocity = self.inner.at(step, t_start)
        told = False

        def watched(x: Tensor, t: float) -> Tensor:
            nonlocal told
            if not told:
                told = True
                self.watch(step, x)
            return velocity(x, t)

        return watched


def _lengths(model: Backbone, ends: Int[Tensor, "B"]) -> Callable[[int], TokenGroups]:
    """One token group per sample, of which the tokens beyond its length are not there."""
    place = model.patch_size * model.grid.coordinates(ends.device)[:, 0]
    groups = TokenGroups(None, (model.num_tokens,), present=place[None] < ends[:, None])
    return lambda step: groups


def _sampling_groups(
    config: SamplingConfig, model: Backbone, indices: Sequence[int], separate: bool
) -> Callable[[int], TokenGroups]:
    """Two token groups per sample, drawn once or per step, as the released SDE sampler has them."""
    tokens, sizes = model.num_tokens, _sampling_sizes(config, model)

    def groups(step: int) -> TokenGroups:
        drawn_at = 0 if config.mask_type == "fixed" else step
        order = torch.stack(
            [
                torch.randperm(tokens, generator=make_generator(config.seed, "groups", i, drawn_at))
                for i in indices
            ]
        )
        return TokenGroups(order.to(model.device), sizes, separate=separate)

    return groups


def _sampling_sizes(config: SamplingConfig, model: Backbone) -> tuple[int, ...]:
    return group_sizes((config.mask_ratio, 1 - config.mask_ratio), model.num_tokens)

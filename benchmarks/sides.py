"""The two sides of the benchmarks: this package's training step and the reference's, taken in turn.

Needs torch, numpy, accelerate, safetensors and jaxtyping alone.
"""

import dataclasses
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from reference import ReferenceSiT, reference_losses, update_ema

from selfalign import ResolvedConfig, draw_views, make_generator, recipe, resolve
from selfalign.backbones.sit.sizes import parse_size
from selfalign.benchmark.limit import seconds_of
from selfalign.benchmark.measure import StepBenchmark


def make_config(
    name: str, size: str, channels: int, side: int, batch: int, **more: Any
) -> ResolvedConfig:
    """A resolved tree for made-up data with ten classes."""
    overrides = {"model.size": size, "training.batch_size": batch, "training.trackers": ()}
    return resolve(recipe(name, {**overrides, **more}), channels, (side, side), 10)


class ReferenceStep:
    """The reference's training step on the same data, weights and draws.

    Args:
        config: a resolved tree; of its precisions fp32 and bf16.
        product: whose weights and device it takes; None for weights of its own, on torch's device.
    """

    def __init__(self, config: ResolvedConfig, product: StepBenchmark | None = None) -> None:
        self.config, model = config, config.model
        settings = {
            "channels": model.channels,
            "image_size": model.image_size,
            "patch_size": model.patch_size,
            "num_classes": model.num_classes,
            "qk_norm": model.qk_norm,
            **dataclasses.asdict(parse_size(model.size)[0]),
        }
        self.device = torch.get_default_device() if product is None else product.accelerator.device
        with self.device:
            self.student, self.teacher = (
                ReferenceSiT(**settings).to(self.device) for _ in range(2)
            )
        if product is not None:
            self.student.load_state_dict(product.take_step.student.state_dict())
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), 1e-4, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        batch = config.training.batch_size
        drawn = {"generator": generator, "device": "cpu"}
        x0 = torch.randn(batch, model.channels, *model.image_size, **drawn)
        labels = torch.randint(model.num_classes, (batch,), **drawn)
        self.x0, self.labels = x0.to(self.device), labels.to(self.device)
        self.step = 0

    def __call__(self) -> float:
        """Take one step and return its seconds."""
        return seconds_of(self.take, self.device)

    def take(self) -> None:
        """Take one step, and wait for nothing."""
        config = self.config
        alignment, ema = config.terms["alignment"], config.targets["ema"]
        generator = make_generator(0, "views", self.step, device=self.device)
        draw = draw_views(config, self.x0, generator)
        tokens = config.model.num_tokens
        group_ids = torch.zeros(len(self.x0), tokens, dtype=torch.long, device=self.device)
        if draw.order is not None:
            first = int(config.views.mask_ratios[0] * tokens)
            group_ids.fill_(1).scatter_(1, draw.order[:, :first], 0)
        with self._autocast():
            out = reference_losses(
                self.student,
                self.teacher,
                self.x0,
                torch.where(draw.label_dropout, config.model.num_classes, self.labels),
                noise=draw.noise,
                timesteps=draw.timesteps,
                teacher_interval=draw.teacher_interval,
                group_ids=group_ids,
                teacher_labels=self.labels,
                method={
                    "path": config.flow.path,
                    "separate": config.views.attention == "separated",
                    "teacher_timestep": ema.timestep,
                    "teacher_groups": ema.groups,
                    "student_block": alignment.tap(config),
                    "teacher_block": ema.tap(config),
                    "distance": alignment.distance,
                    "weight": alignment.weight,
                },
            )
        out["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.teacher, self.student, 0.9999)
        self.step += 1

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.training.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def in_a_row(
    step: StepBenchmark | ReferenceStep, count: int, device: torch.device
) -> Callable[[], float]:
    """What takes some steps as training does, none waiting for the last, and returns seconds of one."""

    def take() -> None:
        for _ in range(count):
            step.take()

    return lambda: seconds_of(take, device) / count


def alternate(
    first: Callable[[], float], second: Callable[[], float], pairs: int, warmup: int = 2
) -> tuple[list[float], list[float]]:
    """Seconds of both sides, taken in turn."""
    for _ in range(warmup):
        first()
        second()
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        taken[0].append(first())
        taken[1].append(second())
    return taken


def spread(values: list[float]) -> str:
    """Median, and the range of all values."""
    return f"{statistics.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]"

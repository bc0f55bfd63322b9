"""One optimizer step: draw, objective, backward, clipping, AdamW, EMA. Nothing in it waits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from selfalign.config import ResolvedConfig, RunConfig
from selfalign.memory import keep_freed_memory
from selfalign.network import Backbone
from selfalign.objective import Losses, Objective
from selfalign.randomness import Share, make_generator
from selfalign.sections import TrainingConfig, ViewsConfig
from selfalign.training.ema import EMA
from selfalign.training.finite import FiniteSteps
from selfalign.training.sharding import is_sharded
from selfalign.views import draw_views
from selfalign.weights import gathered

if TYPE_CHECKING:  # a step by itself needs no images and no files
    from selfalign.curriculums import Learner
    from selfalign.data.batch import Batch


_SHALLOW = 12
"""Blocks up to which the time to compile all of them at once is bearable: sizes S and B."""


def make_optimizer(config: RunConfig, student: nn.Module) -> torch.optim.Optimizer:
    """The chosen optimizer over the student's parameters, but for frozen ones."""
    chosen = config.optimizers[config.training.optimizer]
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    return chosen.build(config.training, trained)


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def compiles_blocks(training: TrainingConfig, depth: int, sharded: bool) -> bool:
    """Whether the compiler is given blocks one by one, and not the objective as a whole.

    Args:
        training: which region is wanted.
        depth: blocks of the model.
        sharded: whether they are gathered one by one.
    """
    region = training.compile_region
    return region == "blocks" or (region == "auto" and (sharded or depth > _SHALLOW))


class TrainingStep:
    """Moves student, optimizer and EMA by one step; what happens is a function of the step.

    Args:
        config: a resolved tree.
        accelerator: device, processes and precision.
        student: the model, on the device.
        ema: its average.
        optimizer: over the student's parameters.
        skipped: steps left out before as not finite.
        averages: further ones that follow the student.
        learner: what chooses how batches are grouped, where that is learnt.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        accelerator: Accelerator,
        student: Backbone,
        ema: EMA[Backbone],
        optimizer: torch.optim.Optimizer,
        skipped: int = 0,
        averages: Sequence[EMA[Backbone]] = (),
        learner: Learner | None = None,
    ) -> None:
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.config, self.accelerator = config, accelerator
        self.student, self.ema, self.averages = student, ema, averages
        self.learner = learner
        self._parameters = list(student.parameters())
        self._model: nn.Module = student
        self._optimizer = optimizer
        sharded = is_sharded(config.training, accelerator)
        if not sharded:
            self._model, self._optimizer = accelerator.prepare(student, optimizer)
            # The objective runs under autocast; whoever looks at the student sees float32.
            accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
        self.finite = FiniteSteps(config.training, optimizer, accelerator.device, skipped)
        # All processes have to agree, and have only the gradient in common.
        self._watches_losses = accelerator.num_processes == 1
        by_block = compiles_blocks(config.training, len(student.blocks), sharded)
        if config.training.compile and by_block:
            for block in [*student.blocks, *ema.model.blocks]:
                block.compile(dynamic=False)
        self.objective = Objective(config, compile=config.training.compile and not by_block)

    def __call__(self, step: int, batches: Sequence[Batch]) -> tuple[list[Losses], Tensor]:
        """Take optimizer step `step`, counted from 0.

        Args:
            step: which step.
            batches: this process's micro-batches, on the device.

        Returns:
            Losses per micro-batch, and the norm of the gradient before clipping.
        """
        losses = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            # Processes exchange gradients at the last micro-batch only; of shards each time, so that none
            # holds them all.
            with nullcontext() if last else self.accelerator.no_sync(self._model):
                loss = self.forward(step, batch, number)
                self.accelerator.backward(loss.total / len(batches))
            losses.append(loss)
        return losses, self.update(step, losses)

    def forward(self, step: int, batch: Batch, number: int = 0) -> Losses:
        """The objective of a step on this process's micro-batch of some number."""
        accelerator, accumulated = self.accelerator, self.config.training.gradient_accumulation
        processes, device = accelerator.num_processes, accelerator.device
        share = Share(number * processes + accelerator.process_index, accumulated * processes)
        generator = make_generator(self.config.seed, "views", step, 0, device=device)
        x0, labels, features = batch
        with accelerator.autocast():
            # Some partitions run the teacher.
            teacher, views = self.ema.model, self.views(step)
            draw = draw_views(self.config, x0, generator, views, teacher, labels, share)
            return self.objective(self._model, teacher, x0, labels, draw, step, features)

    def views(self, step: int) -> ViewsConfig:
        """How the batch of a step is grouped."""
        if self.learner is not None:
            return self.learner.views()
        return self.config.curriculum.views(self.config, step)

    def update(self, step: int, losses: Sequence[Losses]) -> Tensor:
        """Clip, move the weights, and let the average follow. Returns the gradient's norm."""
        training = self.config.training
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        norm = gathered(
            self.accelerator.clip_grad_norm_(self._parameters, training.clip_norm or math.inf)
        )
        checks = [loss.total for loss in losses] if self._watches_losses else []
        if self.accelerator.scaler is None:
            self.finite.step(self.finite.judge([*checks, norm]), self._optimizer)
        else:  # which leaves out steps with infinite gradients by itself
            if checks:
                self.finite.judge(checks)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for average in (self.ema, *self.averages):
            average.update(step)
        return norm

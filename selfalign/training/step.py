"""One optimizer step: draw, objective, backward, clipping, AdamW, EMA. Nothing in it waits."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from selfalign.config import RunConfig, TrainingConfig
from selfalign.data.stream import Batch
from selfalign.errors import UserError
from selfalign.memory import keep_freed_memory
from selfalign.models.sit import SiT
from selfalign.objective import Losses, Objective
from selfalign.randomness import make_generator
from selfalign.training.ema import EMA
from selfalign.views import draw_views


def make_optimizer(training: TrainingConfig, student: SiT) -> torch.optim.AdamW:
    """Fused AdamW over all of the student's parameters."""
    return torch.optim.AdamW(
        student.parameters(),
        lr=training.learning_rate,
        betas=training.adam_betas,
        weight_decay=training.weight_decay,
        fused=True,
    )


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class TrainingStep:
    """Moves student, optimizer and EMA by one step; what happens is a function of the step.

    Args:
        config: a resolved tree.
        accelerator: device, processes and precision.
        student: the model, on the device.
        ema: its average.
        optimizer: over the student's parameters.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        student: SiT,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.config, self.accelerator = config, accelerator
        self.student, self.ema = student, ema
        self._parameters = list(student.parameters())
        self._model: nn.Module
        self._model, self._optimizer = accelerator.prepare(student, optimizer)
        # The objective runs under autocast; whoever looks at the student sees float32.
        accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
        self.objective: Callable[..., Losses] = Objective(config)
        if config.training.compile:
            self.objective = torch.compile(self.objective, dynamic=False)

    def __call__(self, step: int, batches: Sequence[Batch]) -> tuple[list[Losses], Tensor]:
        """Take optimizer step `step`, counted from 0.

        Args:
            step: which step.
            batches: this process's micro-batches, on the device.

        Returns:
            Losses per micro-batch, and the norm of the gradient before clipping.
        """
        losses = []
        for micro_step, (x0, labels) in enumerate(batches):
            last = micro_step == len(batches) - 1
            # Processes exchange gradients at the last micro-batch only.
            with nullcontext() if last else self.accelerator.no_sync(self._model):
                loss = self.forward(step * len(batches) + micro_step, x0, labels)
                self.accelerator.backward(loss.total / len(batches))
            losses.append(loss)
        return losses, self.update(step, losses)

    def forward(self, micro_step: int, x0: Tensor, labels: Tensor) -> Losses:
        """The objective on the draw of a micro-step."""
        rank, device = self.accelerator.process_index, self.accelerator.device
        generator = make_generator(self.config.seed, "views", micro_step, rank, device=device)
        draw = draw_views(self.config, x0.shape, generator)
        with self.accelerator.autocast():
            return self.objective(self._model, self.ema.model, x0, labels, draw)

    def update(self, step: int, losses: Sequence[Losses]) -> Tensor:
        """Clip, move the weights, and let the average follow. Returns the gradient's norm."""
        training = self.config.training
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        norm = self.accelerator.clip_grad_norm_(self._parameters, training.clip_norm or math.inf)
        self._assert_finite(step, losses, norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        return norm

    def _assert_finite(self, step: int, losses: Sequence[Losses], norm: Tensor) -> None:
        """Assert on the device that the step is sound, before the optimizer moves the weights.

        No value travels to Python: on a GPU the failed assertion surfaces at the next
        synchronisation, and by then no weight has changed. Under fp16 the scaler skips steps with
        infinite gradients.
        """
        checks = [loss.total for loss in losses]
        if self.accelerator.scaler is None:
            checks.append(norm)
        try:
            torch._assert_async(torch.isfinite(torch.stack(checks)).all())
        except RuntimeError as error:
            raise UserError(
                f"the loss or its gradient is no longer finite at step {step + 1}: lower "
                f"training.learning_rate ({self.config.training.learning_rate}); earlier "
                "checkpoints are untouched"
            ) from error

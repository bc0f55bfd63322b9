"""Steps whose loss or gradient is not finite: they move nothing, and are noticed without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selfalign.errors import UserError
from selfalign.sections import TrainingConfig
from selfalign.weights import listed

if TYPE_CHECKING:  # a step by itself needs no images and no files
    from selfalign.data.source import Split
    from selfalign.data.stream import BatchOfMicroStep


class FiniteSteps:
    """Keeps a step that is not finite from moving weights, and counts them, on the device.

    More of them in a row than are allowed, and nothing moves any more, until `require` is asked: so a
    run stops with the weights of the last sound step, although nothing waits within a step.

    Args:
        training: `on_nonfinite`, and what messages say.
        optimizer: moved by the steps.
        device: of the losses.
        skipped: steps left out before, of a run that is gone on with.
    """

    def __init__(
        self,
        training: TrainingConfig,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        skipped: int = 0,
    ) -> None:
        self._training, self._optimizer = training, optimizer
        self._allowed = training.nonfinite_allowed
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = torch.full((), skipped, dtype=torch.int64, device=device)

    def judge(self, values: Sequence[Tensor]) -> Tensor:
        """Whether a step has to be left out: 1.0 or 0.0, on the device.

        Args:
            values: numbers that all have to be finite.
        """
        bad = sum(values[1:], start=values[0]).isfinite().logical_not_()
        leave_out = bad | (self._in_a_row > self._allowed)
        self._in_a_row = (self._in_a_row + 1) * leave_out
        self._skipped = self._skipped + bad
        return leave_out.float()

    def step(self, leave_out: Tensor, move: torch.optim.Optimizer) -> None:
        """Step the optimizer, or leave it as it is.

        Args:
            leave_out: from `judge`.
            move: the optimizer, or accelerate's wrapper of it.
        """
        if getattr(self._optimizer, "_step_supports_amp_scaling", False):
            # What a GradScaler tells fused optimizers: they decide on the device.
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]
            self._optimizer.found_inf = leave_out  # type: ignore[attr-defined]
            move.step()
        elif not leave_out.item():  # others cannot be told, so this waits
            move.step()

    def skipped(self) -> int:
        """Steps left out so far. Waits for the device."""
        return int(self._skipped)

    def broken_since(self, done: int) -> int | None:
        """The first step, counted from 1, of more than are allowed in a row; None if there are not.

        Waits for the device.

        Args:
            done: steps done.
        """
        in_a_row = int(self._in_a_row)
        return done - in_a_row + 1 if in_a_row > self._allowed else None


def explain(first: int, training: TrainingConfig, batches: Sequence[BatchOfMicroStep]) -> UserError:
    """Why a run ends: the step, and the images of its batch, those first whose data is not finite.

    Args:
        first: the step, counted from 1.
        training: the settings.
        batches: one per process: what it read.
    """
    from selfalign.data.datasets import image_name

    accumulated = training.gradient_accumulation
    indices: list[int] = []
    bad: list[int] = []
    split: Split = batches[0].split
    for batch in batches:
        for micro_step in range((first - 1) * accumulated, first * accumulated):
            for index in batch.indices(micro_step):
                indices.append(index)
                try:
                    images, _ = split.read([index])
                except UserError:
                    continue
                if not bool(images.isfinite().all()):
                    bad.append(index)
    what = "image" if len(bad or indices) == 1 else "images"
    names = listed([image_name(split, index) for index in dict.fromkeys(bad or indices)])
    if bad:
        return UserError(
            f"the data is not finite at step {first}, and neither is the loss: {what} {names}; repair or "
            "remove them; earlier checkpoints are untouched"
        )
    return UserError(
        f"the loss or its gradient is no longer finite at step {first} (its batch: {what} {names}): "
        f"lower training.learning_rate ({training.learning_rate:g}), or leave such steps out with "
        "--training.on-nonfinite skip:N; earlier checkpoints are untouched"
    )

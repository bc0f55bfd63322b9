"""The exponential moving average of the weights: teacher, and the model that is sampled."""

import copy
from typing import Generic

import torch
from torch import Tensor

from selfalign.network import AnyBackbone
from selfalign.weights import local


class EMA(Generic[AnyBackbone]):
    """Keeps `model`, a frozen copy whose weights follow a student's.

    Args:
        student: the model that is trained.
        decay: share of the average that an update keeps.
        warmup: use min(decay, (1+step)/(10+step)), without which a short run's average stays near
            its initial weights.
    """

    def __init__(self, student: AnyBackbone, decay: float, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        self.model = copy.deepcopy(student).eval().requires_grad_(False)
        self._student = student
        self.follow()

    def follow(self) -> None:
        """Look up the tensors of student and average: once they have been sharded, they are others."""
        self._averages: list[Tensor] = [local(tensor) for tensor in self.model.parameters()]
        self._weights: list[Tensor] = [local(tensor) for tensor in self._student.parameters()]

    def decay_at(self, step: int) -> float:
        """Decay of the update after optimizer step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the student: one fused pass over all weights."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay_at(step))

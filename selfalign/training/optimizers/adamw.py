"""AdamW, the papers' optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.training.optimizers import OptimizerConfig

if TYPE_CHECKING:
    from torch import nn, optim

    from selfalign.sections import TrainingConfig


@register("adamw")
@dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (arXiv:1711.05101), one fused pass over all weights."""

    def build(
        self, training: TrainingConfig, parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> optim.AdamW:
        """torch's, fused."""
        import torch

        return torch.optim.AdamW(
            [parameter for _, parameter in parameters],
            lr=training.learning_rate,
            betas=training.adam_betas,
            weight_decay=training.weight_decay,
            fused=True,
        )

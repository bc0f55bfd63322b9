"""Muon for the hidden matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.parts import register
from selfalign.training.optimizers import OptimizerConfig
from selfalign.training.optimizers.adamw import AdamW

if TYPE_CHECKING:
    from torch import nn, optim

    from selfalign.sections import TrainingConfig

OUTER = ("x_embedder.", "t_embedder.", "y_embedder.", "final_layer.")
"""The layers at both ends, which Muon is not meant for."""


@register("muon")
@dataclass(frozen=True)
class Muon(OptimizerConfig):
    """Orthogonalised momentum (torch.optim.Muon) for matrices of blocks and heads, AdamW for the rest.

    Updates have the root mean square of AdamW's (arXiv:2502.16982), so both take one learning rate.
    """

    momentum: float = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Look ahead along the momentum."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require(0 <= self.momentum < 1, "momentum", "allowed is a number from 0, below 1")

    def build(
        self, training: TrainingConfig, parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> optim.Optimizer:
        """Both as one optimizer."""
        import torch

        from selfalign.training.combined import Combined

        matrices: list[nn.Parameter] = []
        rest: list[tuple[str, nn.Parameter]] = []
        for name, parameter in parameters:
            if parameter.ndim == 2 and not name.startswith(OUTER):
                matrices.append(parameter)
            else:
                rest.append((name, parameter))
        muon = torch.optim.Muon(
            matrices,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            adjust_lr_fn="match_rms_adamw",
        )
        return Combined(muon, AdamW().build(training, rest))

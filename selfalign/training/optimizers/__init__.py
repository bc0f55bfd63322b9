"""Optimizers: what moves the weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfalign.parts import Part

if TYPE_CHECKING:
    from torch import nn, optim

    from selfalign.sections import TrainingConfig


@dataclass(frozen=True)
class OptimizerConfig(Part):
    """Builds an optimizer. Learning rate, weight decay and AdamW's betas come from `training`."""

    kind: ClassVar[str] = "optimizer"

    @abstractmethod
    def build(
        self, training: TrainingConfig, parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> optim.Optimizer:
        """The optimizer over all weights, given by name.

        The training step sets the learning rate of every parameter group before each step. All state is a
        tensor per weight, so that checkpoints can hold it.
        """

"""One class per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.conditions import Condition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor, nn


@register("label")
@dataclass(frozen=True)
class Label(Condition):
    """A class label; label `num_classes` stands for "none". No classes make an unconditional model."""

    def embedder(self, num_classes: int, hidden_size: int) -> nn.Module | None:
        """A vector per class, and a last one for "none" (DiT's `y_embedder`)."""
        from selfalign.embedders import LabelEmbedder

        return LabelEmbedder(num_classes, hidden_size) if num_classes else None

    def null(self, condition: Int[Tensor, B], num_classes: int) -> Int[Tensor, B]:
        """Label `num_classes` for every sample."""
        import torch

        return torch.full_like(condition, num_classes)

    def drop(
        self, condition: Int[Tensor, B], dropped: Bool[Tensor, B], num_classes: int
    ) -> Int[Tensor, B]:
        """Label `num_classes` where it is dropped."""
        import torch

        return torch.where(dropped, num_classes, condition)

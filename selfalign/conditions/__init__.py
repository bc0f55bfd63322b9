"""Conditions: what a sample is conditioned on, how it is dropped, and how it is embedded."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.parts import Part

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor, nn


@dataclass(frozen=True)
class Condition(Part):
    """A kind of condition. What a batch carries of it has the samples along its first axis."""

    kind: ClassVar[str] = "condition"

    attends: ClassVar[bool] = False
    """Whether its embedder gives tokens besides a vector (`texts.Read`), which blocks attend to."""

    @abstractmethod
    def embedder(self, num_classes: int, hidden_size: int) -> nn.Module | None:
        """The backbone's `y_embedder`: from a batch's condition to (B, D), or to a `texts.Read`; None for no
        condition."""

    @abstractmethod
    def null(self, condition: Any, num_classes: int) -> Any:
        """The condition that stands for "none", for as many samples."""

    @abstractmethod
    def drop(self, condition: Any, dropped: Bool[Tensor, B], num_classes: int) -> Any:
        """The condition with that of some samples replaced by "none" (classifier-free guidance)."""

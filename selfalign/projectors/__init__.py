"""Projectors: what turns a block's features into those of a target (g of Eq. 3)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfalign.parts import Part

if TYPE_CHECKING:
    from torch import nn

    from selfalign.tokens import TokenGrid


@dataclass(frozen=True)
class Projector(Part):
    """Builds the head that a comparison hangs onto the student's block."""

    kind: ClassVar[str] = "projector"

    @abstractmethod
    def build(self, width: int, target_width: int, grid: TokenGrid) -> nn.Module:
        """A module that is called as a block is: with features, embedded condition and groups.

        Args:
            width: features D of the student.
            target_width: features Z of the target.
            grid: how samples are cut into tokens.
        """

"""Backbones: the transformers that predict velocities, and how a config builds them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfalign.errors import UserError
from selfalign.parts import Part
from selfalign.settings import require

if TYPE_CHECKING:
    from selfalign.config import ResolvedConfig
    from selfalign.network import Backbone, Tap
    from selfalign.sections import ModelConfig


@dataclass(frozen=True)
class BackboneConfig(Part):
    """Builds a backbone. Size, patch and the data's shape come from the section `model`."""

    kind: ClassVar[str] = "backbone"

    trains: ClassVar[bool] = True
    """Whether it predicts velocities, and so can be trained here."""

    passes_by: ClassVar[bool] = False
    """Whether tokens can pass by some of its blocks (`TokenGroups.passing`)."""

    mixes_timesteps: ClassVar[bool] = True
    """Whether tokens that see each other can have timesteps of their own."""

    pads: ClassVar[bool] = False
    """Whether it leaves out tokens that are not there (`TokenGroups.present`)."""

    @property
    def attends(self) -> bool:
        """Whether its blocks attend to conditions that are texts (`Condition.attends`)."""
        return False

    @abstractmethod
    def depth(self, model: ModelConfig) -> int:
        """Number of blocks."""

    @abstractmethod
    def build(self, config: ResolvedConfig) -> Backbone:
        """The module, with weights that `initialize_weights` is called for afterwards."""

    def attention_heads(self, model: ModelConfig) -> int:
        """Attention heads of a block.

        Raises:
            UserError: this backbone does not show its attention.
        """
        raise UserError(f"model.backbone is {self.name!r}: it does not show its attention")

    def attention_tap(self, block: int) -> Tap:
        """Where a block's queries, keys and values are, (B, N, 3D), each of all heads side by side.

        Args:
            block: counted from 1.

        Raises:
            UserError: this backbone does not show its attention.
        """
        raise UserError(f"model.backbone is {self.name!r}: it does not show its attention")


def find_tap(block: int | float | str, depth: int, setting: str) -> Tap:
    """Where in a backbone features are taken.

    Args:
        block: the number of a block, from 1; a share of the depth (0.3: the block nearest to it); or the
            name of a module, as in `blocks.3.attn`.
        depth: number of blocks.
        setting: names the setting in errors.

    Raises:
        UserError: there is no such block.
    """
    if isinstance(block, str):
        return block
    if isinstance(block, float) and 0 < block <= 1:
        return max(1, round(block * depth))
    require(
        1 <= block <= depth and block == int(block),  # in this order: NaN has no whole part
        setting,
        block,
        f"allowed are a block from 1 to {depth}, a share of the depth up to 1, or a module's name",
    )
    return int(block)

"""DiT: weights of noise-predicting models, to be sampled from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from selfalign.backbones.sit import SiTConfig
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.backbones.dit.model import DiTBackbone
    from selfalign.config import ResolvedConfig


@register("dit")
@dataclass(frozen=True)
class DiTConfig(SiTConfig):
    """A released DiT (arXiv:2212.09748), which predicts noise: sampled and evaluated, not trained."""

    trains: ClassVar[bool] = False

    learned_sigma: bool = True
    """Whether the last layer also has the variance's channels, which no sampler here uses."""

    def build(self, config: ResolvedConfig) -> DiTBackbone:
        """The model."""
        from selfalign.backbones.dit.model import DiTBackbone

        arguments = self.arguments(config)
        return DiTBackbone(
            **arguments, out_channels=(1 + self.learned_sigma) * config.model.channels
        )

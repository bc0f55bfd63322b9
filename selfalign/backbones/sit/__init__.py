"""SiT: the transformer of the papers, with a condition per token group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.backbones import BackboneConfig
from selfalign.backbones.sit.sizes import parse_size
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.backbones.sit.model import SiT
    from selfalign.config import ResolvedConfig
    from selfalign.network import Tap
    from selfalign.sections import ModelConfig


@register("sit")
@dataclass(frozen=True)
class SiTConfig(BackboneConfig):
    """SiT (arXiv:2401.08740) of the size that `model.size` names."""

    passes_by = True
    pads = True

    @property
    def attends(self) -> bool:
        """By cross-attention."""
        return True

    def check_in(self, config: Any) -> None:
        """The size must be one that has a name."""
        parse_size(config.model.size)

    def depth(self, model: ModelConfig) -> int:
        """Number of blocks of the named size."""
        return parse_size(model.size)[0].depth

    def attention_heads(self, model: ModelConfig) -> int:
        """Those of the named size."""
        return parse_size(model.size)[0].heads

    def attention_tap(self, block: int) -> Tap:
        """After the norms of queries and keys, where there are such."""
        return f"blocks.{block - 1}.attn.normed"

    def build(self, config: ResolvedConfig) -> SiT:
        """The model."""
        from selfalign.backbones.sit.model import SiT

        return SiT(**self.arguments(config))

    def arguments(self, config: ResolvedConfig) -> dict[str, Any]:
        """Those of `SiT`."""
        model = config.model
        size, patch_size = parse_size(model.size)
        return {
            "channels": model.channels,
            "image_size": model.image_size,
            "patch_size": patch_size,
            "hidden_size": size.hidden_size,
            "depth": size.depth,
            "heads": size.heads,
            "num_classes": model.num_classes,
            "condition": config.condition,
            "qk_norm": model.qk_norm,
            "gradient_checkpointing": model.gradient_checkpointing,
            "checkpointing": model.checkpointing,
            "mask_token": config.views.hidden_as == "mask",
        }

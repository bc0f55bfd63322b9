"""The attention of a frozen encoder as target: HASTE (arXiv:2505.16792)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.encoders import parse_word
from selfalign.parts import Part, register
from selfalign.settings import require
from selfalign.targets import BuiltTarget, Target

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from selfalign.config import ResolvedConfig
    from selfalign.data.source import DataSource, Features
    from selfalign.network import Tap
    from selfalign.objective import Pass
    from selfalign.vision import Vision


@register("encoder-attention")
@dataclass(frozen=True)
class EncoderAttentionTarget(Target):
    """Queries and keys of an encoder's blocks, which say how its patches attend to each other.

    The encoder runs along in every step: what it would take to store is ten times its features.
    """

    sees_images: ClassVar[bool] = True

    encoder: str = "repa:dinov2-vit-b"
    """A vision transformer of timm, as PART[:MODEL][@SIDE]; its tokens must be as many as the student's."""
    blocks: tuple[int, ...] = (8, 9, 10, 11)
    """Its blocks, counted from 1."""
    heads: int = 0
    """Attention heads of the encoder; left out: found when the run begins."""
    hash: str = ""
    """Of the encoder; left out: found when the run begins."""
    image_side: int = 0
    """Of the images that the encoder sees; left out: found when the run begins."""

    def check(self) -> None:
        """Blocks are counted from 1."""
        self.require(
            bool(self.blocks) and min(self.blocks) >= 1, "blocks", "allowed are numbers from 1"
        )
        self.require_number(
            "heads", 0, 2**10, "a number of heads, or 0 (found when the run begins)"
        )

    def check_in(self, config: Any) -> None:
        """The word must name an encoder."""
        parse_word(self.encoder, self.dotted("encoder"))

    def uses(self, config: Any) -> tuple[Part, ...]:
        """The kind of encoder."""
        return (config.encoders[parse_word(self.encoder).part],)

    def completed(self, config: ResolvedConfig, source: DataSource) -> EncoderAttentionTarget:
        """With the number of heads, and the hash that must be that recorded."""
        from selfalign.data.features import Encoded
        from selfalign.vision import attention_of, open_encoder

        setting = self.dotted("encoder")
        encoded = Encoded(source, config.data, setting)
        shape, found = encoded.describe(self.encoder, "every-step")
        require(
            shape[:2] == config.grid.shape,
            setting,
            self.encoder,
            f"it has {shape[0]}×{shape[1]} tokens and the model {'×'.join(map(str, config.grid.shape))}; "
            "attention cannot be interpolated: allowed is another @SIDE",
        )
        vision = open_encoder(self.encoder, encoded.image_side, setting)
        modules = [attention_of(vision, block, setting) for block in self.blocks]
        heads = {module.num_heads for module in modules}
        require(
            len(heads) == 1, setting, self.encoder, "its blocks have different numbers of heads"
        )
        same = f"it has the hash {found[:16]}…, and the run was begun with {self.hash[:16]}…"
        require(self.hash in ("", found), setting, self.encoder, same)
        side = encoded.image_side
        return dataclasses.replace(self, heads=heads.pop(), hash=found, image_side=side)

    def stored(self, config: ResolvedConfig, source: DataSource) -> Mapping[str, Features]:
        """The images, where the model sees latents."""
        from selfalign.data.features import Encoded

        return Encoded(source, config.data, self.dotted("encoder")).images()

    def build(self, config: ResolvedConfig) -> BuiltTarget:
        """The encoder."""
        from selfalign.vision import open_encoder

        side = self.image_side or max(config.model.image_size)
        return RunningAttention(self, open_encoder(self.encoder, side))

    def features(self, forward: Pass) -> Float[Tensor, "B N Z"]:
        """What is built gives them."""
        raise NotImplementedError


class RunningAttention:
    """The target with its encoder.

    Args:
        target: the settings.
        vision: the encoder.
    """

    def __init__(self, target: EncoderAttentionTarget, vision: Vision) -> None:
        self.target, self.vision = target, vision

    def taps(self, config: ResolvedConfig) -> tuple[Tap, ...]:
        """None."""
        return ()

    def features(self, forward: Pass) -> Float[Tensor, "B N Z"]:
        """Queries, then keys, of every block side by side: Z is (blocks, 2, heads, d)."""
        from selfalign.vision import clean_images, queries_and_keys

        images = clean_images(forward)
        found = queries_and_keys(self.vision.to(images.device), images, self.target.blocks)
        return forward.views.groups.sort(found.to(forward.x0.dtype))

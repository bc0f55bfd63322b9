"""The transformer: SiT with a condition per token group (arXiv:2401.08740, and Eq. 5 to 9)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfalign.config import RunConfig
from selfalign.models.layers import (
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    ProjectionHead,
    SiTBlock,
    TimestepEmbedder,
    position_embedding,
)
from selfalign.models.modulation import ResidualStream
from selfalign.randomness import make_generator
from selfalign.views import TokenGroups, patchify, unpatchify


class SiT(nn.Module):
    """Predicts the velocity of noised tokens, and offers the features of its blocks.

    Parameter names are DiT's and SiT's, so that released weights load by name.

    Args:
        channels, image_size: C and (H, W) of the input; the patch size divides both sides.
        patch_size: side of a patch.
        hidden_size, depth, heads: width D, number of blocks, attention heads.
        num_classes: number of classes; 0 makes an unconditional model.
        qk_norm: normalise queries and keys per head.
        projection_head: whether there is a head for the alignment loss (Eq. 3).
        gradient_checkpointing: recompute blocks in the backward pass.
        out_channels: channels per patch position of the output; released models with learned sigma
            have 2·C, of which the first C are the velocity.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        channels: int,
        image_size: tuple[int, int],
        patch_size: int,
        hidden_size: int,
        depth: int,
        heads: int,
        num_classes: int,
        qk_norm: bool = False,
        projection_head: bool = False,
        gradient_checkpointing: bool = False,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.image_size, self.patch_size = channels, image_size, patch_size
        self.num_classes = num_classes
        self.gradient_checkpointing = gradient_checkpointing
        rows, columns = (side // patch_size for side in image_size)
        self.num_tokens = rows * columns

        self.x_embedder = PatchEmbedder(patch_size, channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size) if num_classes else None
        self.register_buffer("pos_embed", position_embedding(hidden_size, rows, columns))
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, heads, qk_norm) for _ in range(depth))
        self.ap_head = ProjectionHead(hidden_size) if projection_head else None
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * (out_channels or channels))
        self.initialize_weights()

    @classmethod
    def from_config(cls, config: RunConfig) -> "SiT":
        """The model of a resolved config tree. Its weights are a function of the tree's seed."""
        model = config.model
        assert model.channels is not None and model.image_size is not None
        assert model.num_classes is not None
        sit = cls(
            channels=model.channels,
            image_size=model.image_size,
            patch_size=model.patch_size,
            hidden_size=model.dimensions.hidden_size,
            depth=model.dimensions.depth,
            heads=model.dimensions.heads,
            num_classes=model.num_classes,
            qk_norm=model.qk_norm,
            projection_head=config.alignment.target != "none",
            gradient_checkpointing=model.gradient_checkpointing,
        )
        sit.initialize_weights(make_generator(config.seed, "weights"))
        return sit

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """SiT's initialisation: every block starts as the identity, the output as zero.

        The projection head comes last, so that the rest starts the same with and without it.

        Args:
            generator: where the numbers come from; torch's global one if left out.
        """
        modules = sorted(self.named_modules(), key=lambda item: item[0].startswith("ap_head"))
        for _, module in modules:
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias") or ".adaLN_modulation." in name or "final_layer." in name:
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder.", "y_embedder.")):
                nn.init.normal_(parameter, std=0.02, generator=generator)

    @property
    def null_label(self) -> int:
        """The label that stands for "no label"."""
        return self.num_classes

    def forward(
        self,
        tokens: Float[Tensor, "B N P"],
        timesteps: Float[Tensor, "B K"],
        labels: Int[Tensor, "B"],
        groups: TokenGroups,
        student_block: int | None = None,
    ) -> tuple[Float[Tensor, "B N Q"], Float[Tensor, "B N D"] | None]:
        """Velocity of every token, and the projected features of a block on the way (Eq. 2 and 3).

        Args:
            tokens: noised patches in group order, each flattened as (row, column, channel).
            timesteps: one per group.
            labels: one per image; `null_label` for none. Ignored by an unconditional model.
            groups: how the tokens are grouped.
            student_block: block m whose projected features are returned, counted from 1.
        """
        x, condition = self._embed(tokens, timesteps, labels, groups)
        stream = ResidualStream(x, groups)
        self._run_blocks(stream, condition, 0, student_block or 0)
        features = None
        if student_block is not None and self.ap_head is not None:
            features = self.ap_head(stream.x)
        self._run_blocks(stream, condition, student_block or 0, len(self.blocks))
        return self.final_layer(stream, condition), features

    def features(
        self,
        tokens: Float[Tensor, "B N P"],
        timesteps: Float[Tensor, "B K"],
        labels: Int[Tensor, "B"],
        groups: TokenGroups,
        block: int,
    ) -> Float[Tensor, "B N D"]:
        """The output of a block, counted from 1. Later blocks are not run."""
        x, condition = self._embed(tokens, timesteps, labels, groups)
        stream = ResidualStream(x, groups)
        self._run_blocks(stream, condition, 0, block)
        return stream.x

    def velocity(
        self,
        xt: Float[Tensor, "B C H W"],
        timesteps: Float[Tensor, "B"],
        labels: Int[Tensor, "B"],
        groups: TokenGroups | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """dx/dt of whole images, one timestep each. `groups` may separate attention (sampling)."""
        groups = groups or TokenGroups(order=None, sizes=(self.num_tokens,))
        tokens = groups.sort(patchify(xt, self.patch_size))
        per_group = timesteps[:, None].expand(-1, len(groups.sizes))
        velocity, _ = self(tokens, per_group, labels, groups)
        image = unpatchify(groups.restore(velocity), self.patch_size, self.image_size)
        return image[:, : self.channels]

    def _embed(
        self, tokens: Tensor, timesteps: Tensor, labels: Tensor, groups: TokenGroups
    ) -> tuple[Tensor, Tensor]:
        x = self.x_embedder(tokens) + groups.sort(self.pos_embed)
        condition = self.t_embedder(timesteps)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(labels)[:, None]
        return x, condition

    def _run_blocks(self, stream: ResidualStream, condition: Tensor, first: int, last: int) -> None:
        for block in self.blocks[first:last]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                stream.x = checkpoint(
                    _run_block, block, stream.x, condition, stream.groups, use_reentrant=False
                )
            else:
                block(stream, condition)


def _run_block(block: nn.Module, x: Tensor, condition: Tensor, groups: TokenGroups) -> Tensor:
    stream = ResidualStream(x, groups)
    block(stream, condition)
    return stream.x

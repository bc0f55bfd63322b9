"""The transformer: SiT with a condition per token group (arXiv:2401.08740, and Eq. 5 to 9)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from selfalign import ops
from selfalign.conditions import Condition
from selfalign.conditions.label import Label
from selfalign.embedders import TimestepEmbedder, position_embedding
from selfalign.heads import ProjectionHead
from selfalign.masked import attend, attend_within
from selfalign.network import Hidden, Tap
from selfalign.ops.modules import Linear
from selfalign.pretrained import Pretrained
from selfalign.recomputation import recomputed
from selfalign.texts import Read
from selfalign.tokens import TokenGrid, TokenGroups


class PatchEmbedder(nn.Module):
    """Embeds patches that `patchify` cut. The weight is a convolution's, as released models have it."""

    def __init__(self, grid: TokenGrid, channels: int, hidden_size: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(grid.sides) - 1]
        self.proj = convolution(channels, hidden_size, grid.patch_size, stride=grid.patch_size)

    def forward(self, tokens: Float[Tensor, "B N P"]) -> Float[Tensor, "B N D"]:
        """(row, column, channel) patches to features."""
        weight = self.proj.weight.movedim(1, -1).flatten(1)
        bias = self.proj.bias
        assert bias is not None
        return ops.linear(tokens, weight, bias)


class Attention(nn.Module):
    """Multi-head self-attention, within the whole sequence or within each group (Eq. 8 and 9).

    Separation between groups is a dense attention per slice: exactly softmax(QKᵀ + mask)V with a
    block-diagonal mask, at a cost of Σ nₖ² instead of N² and without the mask.
    """

    def __init__(self, hidden_size: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        head_size = hidden_size // heads
        self.q_norm = nn.LayerNorm(head_size) if qk_norm else None
        self.k_norm = nn.LayerNorm(head_size) if qk_norm else None
        self.normed = nn.Identity()  # names the place of what attends, for taps
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"], groups: TokenGroups) -> Float[Tensor, "B N D"]:
        """Attend among all tokens, or within each group where `groups` separates them."""
        qkv = self.normed(self._normalised(self.qkv(x)))
        parts = groups.attention_parts(len(x))
        if groups.present is not None:
            return self.proj(attend_within(qkv, self.heads, parts, groups.present))
        return self.proj(ops.attention(qkv, self.heads, parts))

    def _normalised(self, qkv: Float[Tensor, "B N 3D"]) -> Float[Tensor, "B N 3D"]:
        """Queries and keys normalised per head, where the model does so."""
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast norms in float32
        return torch.stack([q, k, v], dim=2).flatten(2)


class CrossAttention(nn.Module):
    """Tokens attend to a text, whatever group they are in; it starts by adding nothing."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(hidden_size, hidden_size)
        self.kv = Linear(hidden_size, 2 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"], text: Read) -> Float[Tensor, "B N D"]:
        """What the text says to each token."""
        q = self.q(functional.layer_norm(x, x.shape[-1:], eps=1e-6))
        k, v = self.kv(text.tokens).chunk(2, dim=-1)
        return self.proj(attend(q, k, v, self.heads, text.present))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, hidden_size: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Per token."""
        return self.fc2(ops.gelu(self.fc1(x)))


class SiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (DiT, Fig. 3), one condition per group.

    Between its two halves tokens attend to a text, in models that are conditioned on such.
    """

    def __init__(
        self, hidden_size: int, heads: int, qk_norm: bool = False, reads: bool = False
    ) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, heads, qk_norm)
        self.cross = CrossAttention(hidden_size, heads) if reads else None
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        condition: Float[Tensor, "B K D"],
        groups: TokenGroups,
        text: Read | None = None,
    ) -> Float[Tensor, "B N D"]:
        """x + gate·attn(norm(x)), then x + gate·mlp(norm(x)), each norm scaled and shifted."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, -1)
        sizes = groups.sizes
        attended = self.attn(ops.modulated_norm(x, shift1, scale1, sizes), groups)
        x = ops.gated_residual(x, gate1, attended, sizes)
        if self.cross is not None and text is not None:
            x = x + self.cross(x, text)
        fed_forward = self.mlp(ops.modulated_norm(x, shift2, scale2, sizes))
        return ops.gated_residual(x, gate2, fed_forward, sizes)


class FinalLayer(nn.Module):
    """Features to patches."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B K D"], groups: TokenGroups
    ) -> Float[Tensor, "B N P"]:
        """A linear layer on the scaled and shifted norm."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(ops.modulated_norm(x, shift, scale, groups.sizes))


class SiT(Pretrained):
    """Predicts the velocity of noised tokens, and offers the features of its blocks.

    Parameter names are DiT's and SiT's, so that released weights load by name.

    Args:
        channels, image_size: C and (H, W) of the input; the patch size divides both sides. One side makes
            it a model of signals, three one of videos.
        patch_size: side of a patch.
        hidden_size, depth, heads: width D, number of blocks, attention heads.
        num_classes: number of classes; 0 makes an unconditional model.
        condition: what a sample is conditioned on.
        qk_norm: normalise queries and keys per head.
        gradient_checkpointing: recompute blocks in the backward pass.
        checkpointing: which, and what of them, as `recomputed` has it.
        out_channels: channels per patch position of the output; released models with learned sigma
            have 2·C, of which the first C are the velocity.
        mask_token: whether there is a token that stands for hidden ones.
        projection_head: of version 0.1.0, and deprecated: a head `ap_head` on the last block. Now terms of
            the objective add the heads that they need (`add_head`).
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        channels: int,
        image_size: tuple[int, ...],
        patch_size: int,
        hidden_size: int,
        depth: int,
        heads: int,
        num_classes: int,
        condition: Condition | None = None,
        qk_norm: bool = False,
        gradient_checkpointing: bool = False,
        checkpointing: str = "blocks",
        out_channels: int | None = None,
        mask_token: bool = False,
        projection_head: bool = False,
    ) -> None:
        condition = Label() if condition is None else condition
        grid = TokenGrid(tuple(image_size), patch_size)
        super().__init__(grid, channels, condition, num_classes)
        self.hidden_size = hidden_size
        self.gradient_checkpointing, self.checkpointing = gradient_checkpointing, checkpointing
        self.x_embedder = PatchEmbedder(self.grid, channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = condition.embedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", position_embedding(hidden_size, self.grid))
        self.mask_token = nn.Parameter(torch.zeros(hidden_size)) if mask_token else None
        reads = condition.attends and self.y_embedder is not None
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, heads, qk_norm, reads) for _ in range(depth)
        )
        patch_values = self.grid.patch_positions * (out_channels or channels)
        self.final_layer = FinalLayer(hidden_size, patch_values)
        if projection_head:
            self.add_head("ap_head", ProjectionHead(hidden_size), tap=depth)
        self.initialize_weights()

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """SiT's initialisation: every block starts as the identity, the output as zero.

        Heads draw after all other linear layers, and before the embedders' normal numbers, as version
        0.1.0 did: another order would change every run that has been recorded.

        Args:
            generator: where the numbers come from; torch's global one if left out.
        """
        heads = {part for name in self.head_taps for part in self.get_submodule(name).modules()}
        for module in sorted(self.modules(), key=lambda module: module in heads):
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
        for name, parameter in self.named_parameters():
            starts_at_zero = (".adaLN_modulation.", "final_layer", ".cross.proj.")
            if name.endswith(".bias") or any(part in name for part in starts_at_zero):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder.", "y_embedder.", "mask_token")):
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def hub_config(self) -> dict[str, Any]:
        """The arguments that make this model again, as JSON can hold them."""
        attention: Any = self.blocks[0].attn
        return {
            "channels": self.channels,
            "image_size": list(self.image_size),
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "depth": len(self.blocks),
            "heads": attention.heads,
            "num_classes": self.num_classes,
            "qk_norm": attention.q_norm is not None,
            "out_channels": self.final_layer.linear.out_features // self.grid.patch_positions,
        }

    def velocity_head(self) -> nn.Module:
        """A layer as the last one, for a block before it."""
        return FinalLayer(self.hidden_size, self.final_layer.linear.out_features)

    def transform(
        self,
        tokens: Float[Tensor, "B N P"],
        timesteps: Float[Tensor, "B K"],
        condition: Any,
        groups: TokenGroups,
        taps: Sequence[int] = (),
        last: int | None = None,
    ) -> Hidden:
        """See `Backbone.transform`."""
        x = self.x_embedder(tokens)
        if groups.passing is not None and groups.passing.masked:
            kept = sum(groups.sizes[: -groups.passing.groups])
            assert self.mask_token is not None
            x = torch.cat([x[:, :kept], self.mask_token.expand_as(x[:, kept:])], dim=1)
        x = x + groups.sort(self.pos_embed)
        embedded = self.t_embedder(timesteps)
        text: tuple[Read, ...] = ()
        if self.y_embedder is not None:
            label = self.y_embedder(condition)
            if isinstance(label, Read):
                text, label = (label,), label.vector
            embedded = embedded + label[:, None]
        features: dict[Tap, Tensor] = {}
        for number, block in enumerate(self.blocks[:last], 1):
            seen = groups.in_block(number)
            if seen is groups:
                x = self._run(number, block, x, embedded, groups, *text)
            else:  # the last groups pass by
                kept = seen.ends[-1]
                condition_of_kept = embedded[:, : len(seen.sizes)]
                worked_on = self._run(number, block, x[:, :kept], condition_of_kept, seen, *text)
                x = torch.cat([worked_on, x[:, kept:]], dim=1)
            if number in taps:
                features[number] = x
        velocity = self.final_layer(x, embedded, groups) if last is None else None
        return Hidden(velocity, features, embedded)

    def _run(self, number: int, block: nn.Module, *inputs: Any) -> Tensor:
        """A block, which the backward pass runs again where memory is scarce."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return recomputed(self.checkpointing, number, block, *inputs)
        return block(*inputs)

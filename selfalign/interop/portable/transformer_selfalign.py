"""SiT (arXiv:2401.08740) as selfalign trains it, for sampling; needs torch and diffusers alone.

t = 1 is noise, and the output points from data to noise.
"""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional


class TimestepEmbedder(nn.Module):
    """Cosines and sines of t, then an MLP."""

    def __init__(self, hidden_size: int, frequency_features: int = 256) -> None:
        super().__init__()
        self.frequencies = frequency_features // 2
        self.mlp = nn.Sequential(
            nn.Linear(frequency_features, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) to (B, D)."""
        places = torch.arange(self.frequencies, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(-math.log(10_000) * places / self.frequencies)
        angles = timesteps[:, None].float() * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A vector per class, and a last one for "no label"."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) to (B, D)."""
        return self.embedding_table(labels)


class PatchEmbedder(nn.Module):
    """A convolution over patches."""

    def __init__(self, channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, with queries and keys normalised where the model does so."""

    def __init__(self, hidden_size: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(hidden_size // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(hidden_size // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Per token."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift."""
    normed = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning."""

    def __init__(self, hidden_size: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, heads, qk_norm)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D) and (B, D) to (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, -1)
        x = x + gate1[:, None] * self.attn(modulated_norm(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated_norm(x, shift2, scale2))


class FinalLayer(nn.Module):
    """Features to patches."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D) to (B, N, P)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


class SelfAlignTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is not typed
    """Predicts dx/dt of noised images, t = 1 being noise.

    Args:
        channels, image_size: C and (H, W) of the input.
        patch_size: side of a patch, which divides both.
        hidden_size, depth, heads: width, number of blocks, attention heads.
        num_classes: number of classes; label `num_classes` stands for none; 0: unconditional.
        qk_norm: whether queries and keys are normalised.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        channels: int,
        image_size: list[int],
        patch_size: int,
        hidden_size: int,
        depth: int,
        heads: int,
        num_classes: int,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        rows, columns = (side // patch_size for side in image_size)
        self.grid, self.channels, self.patch_size = (rows, columns), channels, patch_size
        self.x_embedder = PatchEmbedder(channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size) if num_classes else None
        self.register_buffer("pos_embed", torch.zeros(1, rows * columns, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, channels * patch_size**2)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """dx/dt of images (B, C, H, W) at timesteps (B,), with labels (B,)."""
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(timesteps)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(labels)
        for block in self.blocks:
            tokens = block(tokens, condition)
        out, side = self.final_layer(tokens, condition), self.patch_size
        out = out.reshape(len(x), *self.grid, side, side, self.channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

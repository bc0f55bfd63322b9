"""The layers of the transformer besides attention. Names are DiT's and SiT's."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from selfalign.models.attention import Attention
from selfalign.models.linear import Linear, gelu_, linear
from selfalign.models.modulation import ResidualStream


class PatchEmbedder(nn.Module):
    """Embeds patches that `patchify` cut. The weight is a convolution's, as released models have it."""

    def __init__(self, patch_size: int, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, tokens: Float[Tensor, "B N P"]) -> Float[Tensor, "B N D"]:
        """(row, column, channel) patches to features."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        bias = self.proj.bias
        assert bias is not None
        return linear(tokens, weight, bias)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t in [0, 1], then an MLP. Runs once per group, not per token."""

    frequencies: Tensor

    def __init__(self, hidden_size: int, frequency_features: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(frequency_features, hidden_size),
            nn.SiLU(),
            Linear(hidden_size, hidden_size),
        )
        half = frequency_features // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timesteps: Float[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Embed each timestep."""
        angles = timesteps[..., None].float() * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """A vector per class, and a last one for "no label"."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Embed each label; the null label is num_classes."""
        return self.embedding_table(labels)


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, hidden_size: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Per token."""
        return self.fc2(gelu_(self.fc1(x)))


class SiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (DiT, Fig. 3), one condition per group."""

    def __init__(self, hidden_size: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, heads, qk_norm)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(self, stream: ResidualStream, condition: Float[Tensor, "B K D"]) -> None:
        """Update the stream, given each group's condition."""
        modulation = self.adaLN_modulation(condition).chunk(6, dim=-1)
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
        stream.add(attn_gate, self.attn(stream.norm(attn_shift, attn_scale), stream.groups))
        stream.add(mlp_gate, self.mlp(stream.norm(mlp_shift, mlp_scale)))


class FinalLayer(nn.Module):
    """Features to patches."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, stream: ResidualStream, condition: Float[Tensor, "B K D"]
    ) -> Float[Tensor, "B N P"]:
        """The stream's tokens, given each group's condition."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(stream.norm(shift, scale))


class ProjectionHead(nn.Module):
    """The student's head g of Eq. 3."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear1 = Linear(hidden_size, 2 * hidden_size)
        self.linear2 = Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Per token."""
        return self.linear2(functional.silu(self.linear1(x)))


def position_embedding(hidden_size: int, rows: int, columns: int) -> Float[Tensor, "1 N D"]:
    """Fixed sine-cosine features: the first half of D encodes the column, the second the row."""

    def encode(positions: Tensor, size: int) -> Tensor:
        frequencies = 10_000.0 ** (-torch.arange(size // 2, dtype=torch.float64) / (size / 2))
        angles = positions.reshape(-1, 1).double() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    half = hidden_size // 2
    return torch.cat([encode(column, half), encode(row, half)], dim=1).float()[None]

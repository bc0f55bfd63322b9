"""What turns timesteps, labels and places into features. Names are DiT's and SiT's."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfalign.ops.modules import Linear
from selfalign.tokens import TokenGrid


def embedder_frequencies(features: int = 256) -> Float[Tensor, "F"]:
    """Frequencies of the cosines and sines of t, from 1 down to 1/10,000; half as many as features."""
    half = features // 2
    return torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)


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
        self.register_buffer(
            "frequencies", embedder_frequencies(frequency_features), persistent=False
        )

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


def position_embedding(hidden_size: int, grid: TokenGrid) -> Float[Tensor, "1 N D"]:
    """Fixed sine-cosine features of every token's place.

    The features are shared out evenly, the last axis first (DiT: the first half encodes the column, the
    second the row); what cannot be shared out stays zero.
    """
    places = grid.coordinates().double()
    share = hidden_size // places.shape[1] // 2 * 2

    def encode(positions: Tensor) -> Tensor:
        frequencies = 10_000.0 ** (-torch.arange(share // 2, dtype=torch.float64) / (share / 2))
        angles = positions[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    features = torch.cat([encode(axis) for axis in reversed(places.unbind(dim=1))], dim=1)
    rest = hidden_size - features.shape[1]
    return nn.functional.pad(features, (0, rest)).float()[None]

"""The operations of a transformer that have a faster form on some processors.

Models call these functions and ask nothing about devices. `reference` says what they compute, in plain
torch; `cpu` has compiled kernels for float32 on x86 processors; `choice` decides which one a call takes.
"""

from jaxtyping import Float
from torch import Tensor

from selfalign.ops import choice, cpu, reference
from selfalign.ops.choice import compiled, use
from selfalign.ops.reference import Part

__all__ = [
    "Part",
    "attention",
    "compiled",
    "gated_residual",
    "gelu",
    "linear",
    "modulated_norm",
    "use",
]


def linear(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, "N"]
) -> Float[Tensor, "... N"]:
    """x·Wᵀ + b."""
    form = cpu if choice.onednn_serves(x, weight, bias) else reference
    return form.linear(x, weight, bias)


def gelu(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """GELU in its tanh form."""
    form = cpu if choice.kernels_serve(x) else reference
    return form.gelu(x)


def attention(
    qkv: Float[Tensor, "B N 3D"], heads: int, parts: tuple[Part, ...]
) -> Float[Tensor, "B N D"]:
    """softmax(QKᵀ/√d)V of every head within each part of the batch.

    Args:
        qkv: queries, keys and values, each of all heads side by side.
        heads: number of heads; each has d = D / heads features.
        parts: (first sample, end sample, first token, end token) of each part, in this order of
            numbers. Together they cover every token once.
    """
    form = cpu if choice.kernels_serve(qkv) else reference
    return form.attention(qkv, heads, parts)


def modulated_norm(
    x: Float[Tensor, "B N D"],
    shift: Float[Tensor, "B K D"],
    scale: Float[Tensor, "B K D"],
    sizes: tuple[int, ...],
) -> Float[Tensor, "B N D"]:
    """norm(x)·(1 + scale) + shift, with each group's scale and shift (DiT's adaLN).

    Args:
        x: tokens; group k is the k-th slice of `sizes[k]` of them.
        shift, scale: per group.
        sizes: tokens in each of the K groups.
    """
    form = cpu if choice.kernels_serve(x, shift, scale) else reference
    return form.modulated_norm(x, shift, scale, sizes)


def gated_residual(
    x: Float[Tensor, "B N D"],
    gate: Float[Tensor, "B K D"],
    update: Float[Tensor, "B N D"],
    sizes: tuple[int, ...],
) -> Float[Tensor, "B N D"]:
    """x + gate·update, with each group's gate (DiT's adaLN-Zero).

    Args:
        x, update: tokens; group k is the k-th slice of `sizes[k]` of them.
        gate: per group.
        sizes: tokens in each of the K groups.
    """
    form = cpu if choice.kernels_serve(x, gate, update) else reference
    return form.gated_residual(x, gate, update, sizes)

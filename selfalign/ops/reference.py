"""What the operations compute, in plain torch: the specification of every faster form.

Derivatives of any order and in both directions pass through them. One exception is torch's own: its fused
attention has no second derivative. Under `torch.func` and forward-mode differentiation the formula takes
its place by itself; a second backward pass by `torch.autograd` needs
`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, as any torch model does.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

Part = tuple[int, int, int, int]
"""First and end sample, first and end token of a dense attention."""
EPSILON = 1e-6
"""Added to the variance in norms, as SiT does."""


def linear(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, "N"]
) -> Float[Tensor, "... N"]:
    """x·Wᵀ + b."""
    return functional.linear(x, weight, bias)


def gelu(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """GELU in its tanh form."""
    return functional.gelu(x, approximate="tanh")


def attention(
    qkv: Float[Tensor, "B N 3D"], heads: int, parts: tuple[Part, ...]
) -> Float[Tensor, "B N D"]:
    """softmax(QKᵀ/√d)V of every head within each part."""
    return join_parts(parts, [_dense_attention(part, heads) for part in split_parts(qkv, parts)])


def split_parts(x: Float[Tensor, "B N D"], parts: tuple[Part, ...]) -> list[Tensor]:
    """The samples and tokens of each part, as views."""
    found: list[Tensor] = []
    for (first, end), row in itertools.groupby(parts, key=lambda part: part[:2]):
        found += x[first:end].split([stop - begin for _, _, begin, stop in row], dim=1)
    return found


def join_parts(parts: tuple[Part, ...], results: Sequence[Tensor]) -> Float[Tensor, "B N D"]:
    """What was made of each part, put together."""
    rows = []  # of parts that have their samples in common
    for _, row in itertools.groupby(zip(parts, results, strict=True), key=lambda both: both[0][:2]):
        rows.append(_join([result for _, result in row], dim=1))
    return _join(rows, dim=0)


def _dense_attention(qkv: Float[Tensor, "b n 3D"], heads: int) -> Float[Tensor, "b n D"]:
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if transforming():
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        out = scores.softmax(dim=-1) @ v
    else:
        out = functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def modulated_norm(
    x: Float[Tensor, "B N D"],
    shift: Float[Tensor, "B K D"],
    scale: Float[Tensor, "B K D"],
    sizes: tuple[int, ...],
) -> Float[Tensor, "B N D"]:
    """norm(x)·(1 + scale) + shift, with each group's scale and shift."""
    normed = functional.layer_norm(x, x.shape[-1:], eps=EPSILON).split(sizes, dim=1)
    conditions = zip(shift.split(1, dim=1), (1 + scale).split(1, dim=1), strict=True)
    return _join([part * s + b for part, (b, s) in zip(normed, conditions, strict=True)], dim=1)


def gated_residual(
    x: Float[Tensor, "B N D"],
    gate: Float[Tensor, "B K D"],
    update: Float[Tensor, "B N D"],
    sizes: tuple[int, ...],
) -> Float[Tensor, "B N D"]:
    """x + gate·update, with each group's gate."""
    parts = zip(gate.split(1, dim=1), update.split(sizes, dim=1), strict=True)
    return x + _join([g * part for g, part in parts], dim=1)


def transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """Put slices together again; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

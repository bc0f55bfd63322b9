"""Self-attention over slices: full, or separated between token groups (Eq. 8 and 9)."""

import itertools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from selfalign import kernels
from selfalign.models.linear import Linear
from selfalign.views import TokenGroups

Part = tuple[int, int, int, int]
"""First and end sample, first and end token of a dense attention."""


class Attention(nn.Module):
    """Multi-head self-attention.

    Separation between groups is a dense attention per slice: exactly softmax(QKᵀ + mask)V with a
    block-diagonal mask (Eq. 8 and 9), at a cost of Σ nₖ² instead of N² and without the mask.
    """

    def __init__(self, hidden_size: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        head_size = hidden_size // heads
        self.q_norm = nn.LayerNorm(head_size) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_size) if qk_norm else nn.Identity()
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"], groups: TokenGroups) -> Float[Tensor, "B N D"]:
        """Attend within the whole sequence, or within each group where `groups` separates them."""
        return self.proj(self.attend(self.qkv(x), groups))

    def attend(self, qkv: Float[Tensor, "B N 3D"], groups: TokenGroups) -> Float[Tensor, "B N D"]:
        """softmax(QKᵀ/√d)V of every head, as a dense attention per part."""
        batch, num_tokens, _ = qkv.shape
        whole = groups.whole if groups.separate else batch
        parts = [(0, whole, 0, num_tokens)] if whole else []
        if whole < batch:
            parts += [(whole, batch, part.start, part.stop) for part in groups.slices]
        if isinstance(self.q_norm, nn.Identity) and kernels.usable(qkv):
            flat = tuple(itertools.chain(*parts))
            if torch.is_grad_enabled():
                return _Attention.apply(qkv, self.heads, flat)
            return kernels.attention(qkv, self.heads, flat)[0]
        heads = qkv.unflatten(2, (3, self.heads, -1))
        split = _SplitHeads.apply(heads, tuple(parts))
        attended = [
            scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2)
            for q, k, v in zip(split[0::3], split[1::3], split[2::3], strict=True)
        ]
        images, tokens = attended[: bool(whole)], attended[bool(whole) :]
        return torch.cat([*images, *([torch.cat(tokens, dim=1)] if tokens else [])]).flatten(2)


class _Attention(torch.autograd.Function):
    """Dense attention within parts, straight from the product's output to the next one's input."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, parts: tuple[int, ...]) -> Tensor:
        out, log_sums = kernels.attention(qkv, heads, parts)
        ctx.save_for_backward(qkv, out, log_sums)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return kernels.attention_backward(grad, *ctx.saved_tensors, ctx.parts), None, None


class _SplitHeads(torch.autograd.Function):
    """Queries, keys and values (b, H, n, d) of each part, as views.

    Autograd would stack and pad the gradients of all these views; here each is copied once, to its
    place in the gradient of the whole.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, ...]:
        ctx.parts, ctx.shape = parts, qkv.shape
        return tuple(
            qkv[first:end, begin:stop, i].transpose(1, 2)
            for first, end, begin, stop in parts
            for i in range(3)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].new_empty(ctx.shape)
        for index, part_grad in enumerate(grads):
            first, end, begin, stop = ctx.parts[index // 3]
            grad[first:end, begin:stop, index % 3] = part_grad.transpose(1, 2)
        return grad, None

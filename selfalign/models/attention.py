"""Self-attention over slices: full, or separated between token groups (Eq. 8 and 9)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from selfalign.models.linear import Linear
from selfalign.views import TokenGroups

Part = tuple[slice, slice]
"""A range of samples and a range of tokens."""


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
        batch, num_tokens, hidden_size = x.shape
        qkv = self.qkv(x).view(batch, num_tokens, 3, self.heads, -1)
        if groups.separate:
            rest = slice(groups.whole, batch)
            parts = [(rest, part) for part in groups.slices]
            whole = [(slice(0, groups.whole), slice(0, num_tokens))] if groups.whole else []
            attended = self._attend(qkv, (*whole, *parts))
            out = torch.cat(attended[len(whole) :], dim=1)
            if whole:
                out = torch.cat([attended[0], out])
        else:
            (out,) = self._attend(qkv, ((slice(0, batch), slice(0, num_tokens)),))
        return self.proj(out.reshape(batch, num_tokens, hidden_size))

    def _attend(
        self, qkv: Float[Tensor, "B N 3 H d"], parts: tuple[Part, ...]
    ) -> list[Float[Tensor, "b n H d"]]:
        """Full attention within each part."""
        heads = _SplitHeads.apply(qkv, parts)
        return [
            scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2)
            for q, k, v in zip(heads[0::3], heads[1::3], heads[2::3], strict=True)
        ]


class _SplitHeads(torch.autograd.Function):
    """Queries, keys and values (b, H, n, d) of each part, as views.

    Autograd would stack and pad the gradients of all these views; here each is copied once, to its
    place in the gradient of the whole.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, ...]:
        ctx.parts, ctx.shape = parts, qkv.shape
        return tuple(
            qkv[samples, tokens, i].transpose(1, 2) for samples, tokens in parts for i in range(3)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].new_empty(ctx.shape)
        for index, part_grad in enumerate(grads):
            samples, tokens = ctx.parts[index // 3]
            grad[samples, tokens, index % 3] = part_grad.transpose(1, 2)
        return grad, None

"""Self-attention over slices: full, or separated between token groups (Eq. 8 and 9)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from selfalign.views import TokenGroups


class Attention(nn.Module):
    """Multi-head self-attention.

    Separation between groups is a dense attention per slice: exactly softmax(QKᵀ + mask)V with a
    block-diagonal mask (Eq. 8 and 9), at a cost of Σ nₖ² instead of N² and without the mask.
    """

    def __init__(self, hidden_size: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        head_size = hidden_size // heads
        self.q_norm = nn.LayerNorm(head_size) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_size) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"], groups: TokenGroups) -> Float[Tensor, "B N D"]:
        """Attend within the whole sequence, or within each group where `groups` separates them."""
        batch, num_tokens, hidden_size = x.shape
        qkv = self.qkv(x).view(batch, num_tokens, 3, self.heads, -1)
        if not groups.separate:
            out = self._attend(qkv)
        else:
            whole, grouped = qkv.split([groups.whole, batch - groups.whole])
            slices = [self._attend(part) for part in grouped.split(groups.sizes, dim=1)]
            out = torch.cat(slices, dim=1)
            if groups.whole:
                out = torch.cat([self._attend(whole), out])
        return self.proj(out.reshape(batch, num_tokens, hidden_size))

    def _attend(self, qkv: Float[Tensor, "B n 3 H d"]) -> Float[Tensor, "B n H d"]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2)

"""Attention where some keys are not there: what is missing is one row of a mask per sample."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from selfalign.ops.reference import Part, join_parts, split_parts


def attend(
    q: Float[Tensor, "B N D"],
    k: Float[Tensor, "B L D"],
    v: Float[Tensor, "B L D"],
    heads: int,
    present: Bool[Tensor, "B L"],
) -> Float[Tensor, "B N D"]:
    """softmax(QKᵀ/√d)V of every head over the keys that are present; over all where none is."""
    present = present | ~present.any(dim=1, keepdim=True)
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=present[:, None, None])
    return out.transpose(1, 2).flatten(2)


def attend_within(
    qkv: Float[Tensor, "B N 3D"], heads: int, parts: tuple[Part, ...], present: Bool[Tensor, "B N"]
) -> Float[Tensor, "B N D"]:
    """`ops.attention`, each part among its tokens that are present."""
    attended = []
    for x, (first, end, begin, stop) in zip(split_parts(qkv, parts), parts, strict=True):
        q, k, v = x.chunk(3, dim=2)
        attended.append(attend(q, k, v, heads, present[first:end, begin:stop]))
    return join_parts(parts, attended)

"""Softmax attention within parts, from the output of one matmul to the input of the next."""

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.ops.cpu.call import call, numbers
from selfalign.ops.cpu.operation import operation
from selfalign.ops.reference import Part


@operation(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor log_sums, int[] parts) -> Tensor",
    fake=lambda grad, qkv, out, log_sums, parts: qkv.new_empty(qkv.shape),
)
def _attention_backward(
    grad: Float[Tensor, "B N D"],
    qkv: Float[Tensor, "B N 3D"],
    out: Float[Tensor, "B N D"],
    log_sums: Float[Tensor, "B H N"],
    parts: Sequence[int],
) -> Float[Tensor, "B N 3D"]:
    grad, qkv = grad.contiguous(), qkv.contiguous()
    grad_qkv = torch.empty_like(qkv)
    batch, heads, tokens = log_sums.shape
    call(
        "attention_backward",
        *(qkv, out, log_sums, grad, grad_qkv, *_parts(tuple(parts), batch, tokens)),
        *(tokens, heads, out.shape[2] // heads),
    )
    return grad_qkv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, _, ctx.parts = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    return _attention_backward(grad, *ctx.saved_tensors, ctx.parts), None, None


@operation(
    "attention(Tensor qkv, int heads, int[] parts) -> (Tensor, Tensor)",
    fake=lambda qkv, heads, parts: (
        qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
        qkv.new_empty(qkv.shape[0], heads, qkv.shape[1]),
    ),
    setup_context=_setup_context,
    backward=_backward,
)
def _attention(
    qkv: Float[Tensor, "B N 3D"], heads: int, parts: Sequence[int]
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B H N"]]:
    """The attended values, and the softmax's denominators: their logarithms to the base of 2."""
    batch, tokens, width = qkv.shape
    if width % (3 * heads):
        raise ValueError(f"{width} numbers are not q, k and v of {heads} heads")
    qkv = qkv.contiguous()
    out = qkv.new_empty(batch, tokens, width // 3)
    log_sums = qkv.new_empty(batch, heads, tokens)
    call(
        "attention_forward",
        *(qkv, out, log_sums, *_parts(tuple(parts), batch, tokens)),
        *(tokens, heads, width // 3 // heads),
    )
    return out, log_sums


def attention(
    qkv: Float[Tensor, "B N 3D"], heads: int, parts: tuple[Part, ...]
) -> Float[Tensor, "B N D"]:
    """softmax(QKᵀ/√d)V of every head within each part."""
    return _attention(qkv, heads, tuple(itertools.chain(*parts)))[0]


@functools.lru_cache
def _parts(
    parts: tuple[int, ...], batch: int, tokens: int
) -> tuple[ctypes.Array[ctypes.c_int64], int]:
    """The parts and their number, as the kernels take them: these look at no bounds themselves."""
    times = np.zeros((batch, tokens), dtype=int)
    for first, end, begin, stop in np.reshape(parts, (-1, 4)):
        if not 0 <= first < end <= batch or not 0 <= begin < stop <= tokens:
            raise ValueError(f"no part of {batch} samples of {tokens} tokens: {parts}")
        times[first:end, begin:stop] += 1
    if (times != 1).any():
        raise ValueError(f"the parts do not cover {batch} x {tokens} tokens once each: {parts}")
    return numbers(parts), len(parts) // 4

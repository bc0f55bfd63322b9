"""What a float32 step on a CPU does between its large products, in one pass each.

torch runs attention at a third of the rate that such a processor multiplies at, and spends a pass over
memory, or a slow tanh, on every small operation (benchmarks/step.md). Here are the same functions
compiled from `cpu.cpp`, forward and backward. Callers ask `usable` first and have the plain formula of
torch for all other devices, dtypes and machines.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfalign.kernels.build import library
from selfalign.kernels.opaque import opaque

WIDTH = 16
"""Rows of D numbers are worked on if D is a multiple of this."""
EPSILON = 1e-6
"""Added to the variance, as in SiT's norms."""


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: real float32 tensors on a CPU, in rows of whole vectors."""
    return (
        all(
            tensor.device.type == "cpu"
            and tensor.dtype == torch.float32
            and type(tensor) in (Tensor, nn.Parameter)
            and tensor.shape[-1] % WIDTH == 0
            for tensor in tensors
        )
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


def available() -> bool:
    """Whether there are compiled kernels on this machine."""
    return library() is not None


torch.compiler.assume_constant_result(available)  # the compiler need not look for g++


@opaque(
    "(Tensor qkv, int heads, int[] parts) -> (Tensor, Tensor)",
    lambda qkv, heads, parts: (
        qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
        qkv.new_empty(qkv.shape[0], heads, qkv.shape[1]),
    ),
)
def attention(
    qkv: Float[Tensor, "B N 3D"], heads: int, parts: Sequence[int]
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B H N"]]:
    """softmax(q·kᵀ/√d)·v of every head within each part, and the softmax's denominators.

    Args:
        qkv: queries, keys and values, each of H heads with d = D/H features.
        heads: H.
        parts: four numbers each: first and end sample, first and end token. Together they cover
            every token once.

    Returns:
        The attended values, and the denominators' logarithms to the base of 2.
    """
    batch, tokens, width = qkv.shape
    qkv = qkv.contiguous()
    out = qkv.new_empty(batch, tokens, width // 3)
    log_sums = qkv.new_empty(batch, heads, tokens)
    _call(
        "attention_forward",
        *(qkv, out, log_sums, _numbers(tuple(parts)), len(parts) // 4),
        *(tokens, heads, width // 3 // heads),
    )
    return out, log_sums


@opaque(
    "(Tensor grad, Tensor qkv, Tensor out, Tensor log_sums, int[] parts) -> Tensor",
    lambda grad, qkv, out, log_sums, parts: qkv.new_empty(qkv.shape),
)
def attention_backward(
    grad: Float[Tensor, "B N D"],
    qkv: Float[Tensor, "B N 3D"],
    out: Float[Tensor, "B N D"],
    log_sums: Float[Tensor, "B H N"],
    parts: Sequence[int],
) -> Float[Tensor, "B N 3D"]:
    """Gradient of `attention` with respect to `qkv`, from its results."""
    grad, qkv = grad.contiguous(), qkv.contiguous()
    grad_qkv = torch.empty_like(qkv)
    _, heads, tokens = log_sums.shape
    _call(
        "attention_backward",
        *(qkv, out, log_sums, grad, grad_qkv, _numbers(tuple(parts)), len(parts) // 4),
        *(tokens, heads, out.shape[2] // heads),
    )
    return grad_qkv


@opaque(
    "(Tensor x, Tensor? gate, Tensor? update, Tensor shift, Tensor scale, int[] ends)"
    " -> (Tensor, Tensor, Tensor)",
    lambda x, gate, update, shift, scale, ends: (
        x.new_empty(x.shape if gate is not None else 0),
        x.new_empty(x.shape),
        x.new_empty(*x.shape[:2], 2),
    ),
)
def residual_norm(
    x: Float[Tensor, "B N D"],
    gate: Float[Tensor, "B K D"] | None,
    update: Float[Tensor, "B N D"] | None,
    shift: Float[Tensor, "B K D"],
    scale: Float[Tensor, "B K D"],
    ends: Sequence[int],
) -> tuple[Tensor, Float[Tensor, "B N D"], Float[Tensor, "B N 2"]]:
    """x + gate·update; norm(x + gate·update)·(1 + scale) + shift; each token's mean and 1/σ.

    Args:
        x: tokens in group order.
        gate, update: None for both: then x itself is normed, and the first result is empty.
        shift, scale: per group.
        ends: where each group's tokens end.
    """
    x = x.contiguous()
    total = x.new_empty(0) if gate is None else torch.empty_like(x)
    return total, *residual_norm_into(total, x, gate, update, shift, scale, ends)


def residual_norm_into(
    total: Tensor,
    x: Tensor,
    gate: Tensor | None,
    update: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    ends: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`residual_norm`, with the sum written to `total`, which may be x. Not for the compiler.

    Both are contiguous. Returns the norm and each token's mean and 1/σ.
    """
    update = _contiguous(update)
    gate = None if gate is None else _conditions(gate)[0]
    shift, scale = _conditions(shift, scale)
    normed, moments = torch.empty_like(x), x.new_empty(*x.shape[:2], 2)
    _call(
        "residual_norm_forward",
        *(x, gate, update, *_strides(gate), shift, scale, *_strides(shift)),
        *(total, normed, moments, _numbers(tuple(ends))),
        *(len(x), x.shape[1], len(ends), x.shape[2], EPSILON),
    )
    return normed, moments


@opaque(
    "(Tensor? grad_total, Tensor grad, Tensor total, Tensor moments, Tensor? gate, Tensor? update,"
    " Tensor scale, int[] ends) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad_total, grad, total, moments, gate, update, scale, ends: (
        grad.new_empty(grad.shape),
        grad.new_empty(scale.shape if gate is not None else 0),
        grad.new_empty(grad.shape if gate is not None else 0),
        grad.new_empty(scale.shape),
        grad.new_empty(scale.shape),
    ),
)
def residual_norm_backward(
    grad_total: Float[Tensor, "B N D"] | None,
    grad: Float[Tensor, "B N D"],
    total: Float[Tensor, "B N D"],
    moments: Float[Tensor, "B N 2"],
    gate: Float[Tensor, "B K D"] | None,
    update: Float[Tensor, "B N D"] | None,
    scale: Float[Tensor, "B K D"],
    ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `residual_norm` with respect to x, gate, update, shift and scale.

    Without a gate, the second and third are empty.

    Args:
        grad_total, grad: gradients of the sum, if it was used, and of the norm.
        total, moments: what was normed, and the last result of `residual_norm`.
        gate, update, scale, ends: as they were given to it.
    """
    grad, total = grad.contiguous(), total.contiguous()
    grad_total, update = _contiguous(grad_total), _contiguous(update)
    gate = None if gate is None else _conditions(gate)[0]
    (scale,) = _conditions(scale)
    grad_x, grad_update = (torch.empty_like(grad) for _ in range(2))
    grad_gate, grad_shift, grad_scale = (grad.new_empty(scale.shape) for _ in range(3))
    if gate is None:
        grad_gate, grad_update = grad.new_empty(0), grad.new_empty(0)
    _call(
        "residual_norm_backward",
        *(grad_total, grad, total, moments, gate, update, *_strides(gate), scale, *_strides(scale)),
        *(grad_x, grad_gate, grad_update, grad_shift, grad_scale, _numbers(tuple(ends))),
        *(len(grad), grad.shape[1], len(ends), grad.shape[2]),
    )
    return grad_x, grad_gate, grad_update, grad_shift, grad_scale


@opaque("(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
def gelu(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """GELU in its tanh form."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("gelu_forward", x, out, x.numel())
    return out


def gelu_(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """`gelu`, written over x, which is contiguous. Not for the compiler."""
    assert x.is_contiguous()
    _call("gelu_forward", x, x, x.numel())
    return x


@opaque("(Tensor grad, Tensor x) -> Tensor", lambda grad, x: x.new_empty(x.shape))
def gelu_backward(
    grad: Float[Tensor, "... D"], x: Float[Tensor, "... D"]
) -> Float[Tensor, "... D"]:
    """Gradient of `gelu`."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    _call("gelu_backward", grad, x, grad_x, x.numel())
    return grad_x


@opaque(
    "(Tensor grad, Tensor x) -> (Tensor, Tensor)",
    lambda grad, x: (grad.new_empty(grad.shape[-1], x.shape[-1]), grad.new_empty(grad.shape[-1])),
)
def linear_gradients(
    grad: Float[Tensor, "... N"], x: Float[Tensor, "... K"]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N"]]:
    """gradᵀ·x and the sums of grad's columns: the gradients of a linear layer's weight and bias."""
    grad, x = grad.contiguous(), x.contiguous()
    outputs, inputs = grad.shape[-1], x.shape[-1]
    grad_weight, grad_bias = grad.new_empty(outputs, inputs), grad.new_empty(outputs)
    rows = x.numel() // inputs
    _call("linear_gradients", grad, x, grad_weight, grad_bias, rows, outputs, inputs)
    return grad_weight, grad_bias


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _conditions(*conditions: Tensor) -> tuple[Tensor, ...]:
    """The conditions with equal strides, and each one's features side by side."""
    strides = {condition.stride() for condition in conditions}
    if len(strides) > 1 or any(stride[2] != 1 for stride in strides):
        return tuple(condition.contiguous() for condition in conditions)
    return conditions


def _strides(condition: Tensor | None) -> tuple[int, ...]:
    """From sample to sample, and from group to group."""
    return (0, 0) if condition is None else condition.stride()[:2]


def _call(name: str, *arguments: Any) -> None:
    """Call a kernel; tensors are passed by their addresses, and None as null."""
    _function(name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


_ARGUMENTS = {
    "attention_forward": "aaaaiiii",
    "attention_backward": "aaaaaaiiii",
    "residual_norm_forward": "aaaiiaaiiaaaaiiiif",
    "residual_norm_backward": "aaaaaaiiaiiaaaaaaiiii",
    "gelu_forward": "aai",
    "gelu_backward": "aaai",
    "linear_gradients": "aaaaiii",
}
"""What each function of `cpu.cpp` takes: addresses, whole numbers and float32 numbers."""
_TYPES = {"a": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


@functools.cache
def _function(name: str) -> Callable[..., None]:
    function = getattr(library(), name)
    function.restype, function.argtypes = None, [_TYPES[kind] for kind in _ARGUMENTS[name]]
    return function


@functools.cache
def _numbers(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)

"""The residual stream and its norms, with a scale, shift and gate per token group, in one pass each."""

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.ops.cpu.call import call, numbers
from selfalign.ops.cpu.operation import operation
from selfalign.ops.reference import EPSILON

# ---- x + gate·update


@operation(
    "gated_residual_backward(Tensor grad, Tensor gate, Tensor update, int[] sizes)"
    " -> (Tensor, Tensor)",
    fake=lambda grad, gate, update, sizes: (
        grad.new_empty(gate.shape),
        grad.new_empty(grad.shape),
    ),
)
def _gated_residual_backward(
    grad: Float[Tensor, "B N D"],
    gate: Float[Tensor, "B K D"],
    update: Float[Tensor, "B N D"],
    sizes: Sequence[int],
) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B N D"]]:
    grad, update, (gate,) = grad.contiguous(), update.contiguous(), _conditions(gate)
    grad_gate, grad_update = grad.new_empty(gate.shape), torch.empty_like(grad)
    call(
        "gated_residual_backward",
        *(grad, gate, update, *_strides(gate), grad_gate, grad_update),
        *_extents(grad, sizes),
    )
    return grad_gate, grad_update


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, gate, update, ctx.sizes = inputs
    ctx.save_for_backward(gate, update)


def _derive_residual(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, *_gated_residual_backward(grad, *ctx.saved_tensors, ctx.sizes), None


@operation(
    "gated_residual(Tensor x, Tensor gate, Tensor update, int[] sizes) -> Tensor",
    fake=lambda x, gate, update, sizes: x.new_empty(x.shape),
    setup_context=_save_residual,
    backward=_derive_residual,
)
def gated_residual(
    x: Float[Tensor, "B N D"],
    gate: Float[Tensor, "B K D"],
    update: Float[Tensor, "B N D"],
    sizes: Sequence[int],
) -> Float[Tensor, "B N D"]:
    """x + gate·update, with each group's gate."""
    _check_shapes(x, sizes, gate, update=update)
    x, update, (gate,) = x.contiguous(), update.contiguous(), _conditions(gate)
    out = torch.empty_like(x)
    call("gated_residual_forward", x, gate, update, *_strides(gate), out, *_extents(x, sizes))
    return out


# ---- norm(x)·(1 + scale) + shift


@operation(
    "modulated_norm_backward(Tensor grad, Tensor x, Tensor moments, Tensor scale, int[] sizes)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, x, moments, scale, sizes: (
        grad.new_empty(grad.shape),
        grad.new_empty(scale.shape),
        grad.new_empty(scale.shape),
    ),
)
def _modulated_norm_backward(
    grad: Float[Tensor, "B N D"],
    x: Float[Tensor, "B N D"],
    moments: Float[Tensor, "B N 2"],
    scale: Float[Tensor, "B K D"],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, (scale,) = grad.contiguous(), x.contiguous(), _conditions(scale)
    grad_x = torch.empty_like(grad)
    grad_shift, grad_scale = (grad.new_empty(scale.shape) for _ in range(2))
    call(
        "modulated_norm_backward",
        *(grad, x, moments, scale, *_strides(scale)),
        *(grad_x, grad_shift, grad_scale, *_extents(grad, sizes)),
    )
    return grad_x, grad_shift, grad_scale


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, scale, ctx.sizes = inputs
    ctx.save_for_backward(x, output[1], scale)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _derive_norm(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    return *_modulated_norm_backward(grad, *ctx.saved_tensors, ctx.sizes), None


@operation(
    "modulated_norm(Tensor x, Tensor shift, Tensor scale, int[] sizes) -> (Tensor, Tensor)",
    fake=lambda x, shift, scale, sizes: (
        x.new_empty(x.shape),
        x.new_empty(*x.shape[:2], 2),
    ),
    setup_context=_save_norm,
    backward=_derive_norm,
)
def _modulated_norm(
    x: Float[Tensor, "B N D"],
    shift: Float[Tensor, "B K D"],
    scale: Float[Tensor, "B K D"],
    sizes: Sequence[int],
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N 2"]]:
    """The norm, and each token's mean and 1/σ."""
    _check_shapes(x, sizes, shift, scale)
    x, (shift, scale) = x.contiguous(), _conditions(shift, scale)
    normed, moments = torch.empty_like(x), x.new_empty(*x.shape[:2], 2)
    call(
        "modulated_norm_forward",
        *(x, shift, scale, *_strides(shift), normed, moments, *_extents(x, sizes), EPSILON),
    )
    return normed, moments


def modulated_norm(
    x: Float[Tensor, "B N D"],
    shift: Float[Tensor, "B K D"],
    scale: Float[Tensor, "B K D"],
    sizes: tuple[int, ...],
) -> Float[Tensor, "B N D"]:
    """norm(x)·(1 + scale) + shift, with each group's scale and shift."""
    return _modulated_norm(x, shift, scale, sizes)[0]


# ---- what the kernels are told


def _check_shapes(
    x: Tensor, sizes: Sequence[int], *conditions: Tensor, update: Tensor | None = None
) -> None:
    """The kernels look at no bounds themselves."""
    batch, tokens, width = x.shape
    if sum(sizes) != tokens or min(sizes) < 0:
        raise ValueError(f"groups of {tuple(sizes)} tokens are not {tokens} tokens")
    if update is not None and update.shape != x.shape:
        raise ValueError(f"an update of {tuple(update.shape)} for tokens of {tuple(x.shape)}")
    for condition in conditions:
        if condition.shape != (batch, len(sizes), width):
            raise ValueError(
                f"a condition of {tuple(condition.shape)} for {len(sizes)} groups of tokens of "
                f"{tuple(x.shape)}"
            )


def _conditions(*conditions: Tensor) -> tuple[Tensor, ...]:
    """The conditions with equal strides, and each one's features side by side."""
    strides = {condition.stride() for condition in conditions}
    if len(strides) > 1 or any(stride[2] != 1 for stride in strides):
        return tuple(condition.contiguous() for condition in conditions)
    return conditions


def _strides(condition: Tensor) -> tuple[int, ...]:
    """From sample to sample, and from group to group."""
    return condition.stride()[:2]


def _extents(x: Tensor, sizes: Sequence[int]) -> tuple[Any, ...]:
    """Where the groups end, and the numbers of samples, tokens, groups and features."""
    return _ends(tuple(sizes)), len(x), x.shape[1], len(sizes), x.shape[2]


@functools.lru_cache
def _ends(sizes: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return numbers(tuple(itertools.accumulate(sizes)))

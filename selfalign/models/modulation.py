"""Scales and shifts per token group (adaLN), written straight into each group's slice.

Autograd's own slices would cost a copy of every token to put the slices together again, and another in
the backward pass; these functions write results where they belong. The compiler fuses the plain
formulas by itself, so it is given those.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from selfalign import kernels
from selfalign.views import TokenGroups


def modulated_norm(
    x: Float[Tensor, "B N D"],
    shift: Float[Tensor, "B K D"],
    scale: Float[Tensor, "B K D"],
    groups: TokenGroups,
) -> Float[Tensor, "B N D"]:
    """norm(x)·(1 + scale) + shift, with each group's scale and shift (DiT, adaLN)."""
    if not torch.compiler.is_compiling() and kernels.usable(x, shift, scale):
        return _ModulatedNorm.apply(x, shift, scale, groups.ends)
    normed = functional.layer_norm(x, x.shape[-1:], eps=kernels.EPSILON)
    if torch.compiler.is_compiling():
        return normed * groups.broadcast(1 + scale) + groups.broadcast(shift)
    return _Modulate.apply(normed, shift, 1 + scale, groups.slices)


def add_gated(
    x: Float[Tensor, "B N D"],
    gate: Float[Tensor, "B K D"],
    update: Float[Tensor, "B N D"],
    groups: TokenGroups,
) -> Float[Tensor, "B N D"]:
    """x + gate·update, with each group's gate (DiT, adaLN-Zero)."""
    if torch.compiler.is_compiling():
        return x + groups.broadcast(gate) * update
    if kernels.usable(x, gate, update):
        return _FusedAddGated.apply(x, gate, update, groups.ends)
    return _AddGated.apply(x, gate, update, groups.slices)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, ends: tuple[int, ...]) -> Tensor:
        out, moments = kernels.modulated_norm(x, shift, scale, ends)
        ctx.save_for_backward(x, moments, scale)
        ctx.ends = ends
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *kernels.modulated_norm_backward(grad, *ctx.saved_tensors, ctx.ends), None


class _FusedAddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, update: Tensor, ends: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(gate, update)
        ctx.ends = ends
        return kernels.add_gated(x, gate, update, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *kernels.add_gated_backward(grad, *ctx.saved_tensors, ctx.ends), None


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, slices: tuple[slice, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.slices = slices
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, scale.dtype))
        for k, part in enumerate(slices):
            torch.addcmul(shift[:, k, None], x[:, part], scale[:, k, None], out=out[:, part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        grad_x, grad_scale = _scaled_backward(grad, x, scale, ctx.slices)
        grad_shift = torch.stack([grad[:, part].sum(dim=1) for part in ctx.slices], dim=1)
        return grad_x, grad_shift, grad_scale, None


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, update: Tensor, slices: tuple[slice, ...]
    ) -> Tensor:
        ctx.save_for_backward(update, gate)
        ctx.slices = slices
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, update.dtype))
        for k, part in enumerate(slices):
            torch.addcmul(x[:, part], update[:, part], gate[:, k, None], out=out[:, part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        update, gate = ctx.saved_tensors
        grad_update, grad_gate = _scaled_backward(grad, update, gate, ctx.slices)
        return grad, grad_gate, grad_update, None


def _scaled_backward(
    grad: Float[Tensor, "B N D"],
    x: Float[Tensor, "B N D"],
    scale: Float[Tensor, "B K D"],
    slices: tuple[slice, ...],
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B K D"]]:
    """Gradients of scale·x with respect to x and to each group's scale."""
    grad_x = torch.empty_like(grad)
    grad_scale = []
    for k, part in enumerate(slices):
        torch.mul(grad[:, part], scale[:, k, None], out=grad_x[:, part])
        grad_scale.append((grad[:, part] * x[:, part]).sum(dim=1))
    return grad_x, torch.stack(grad_scale, dim=1)

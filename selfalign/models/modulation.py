"""The residual stream, and its scales, shifts and gates per token group (adaLN).

Autograd's own slices would cost a copy of every token to put the slices together again, and another in
the backward pass; the functions here write results where they belong. The compiler fuses the plain
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


class ResidualStream:
    """The tokens' features on their way through the blocks: x ← x + gate·update (DiT, adaLN-Zero).

    An update waits until the next norm asks for the sum, so that both take one pass over memory.

    Args:
        x: the features, in group order.
        groups: which tokens share a condition.
    """

    def __init__(self, x: Float[Tensor, "B N D"], groups: TokenGroups) -> None:
        self.groups = groups
        self._x = x
        self._branch: tuple[Tensor, Tensor] | None = None
        self._own = False  # whether nobody else has seen `_x`: then a sum may be written over it

    @property
    def x(self) -> Float[Tensor, "B N D"]:
        """The features, all updates included."""
        self._settle()
        self._own = False
        return self._x

    @x.setter
    def x(self, value: Float[Tensor, "B N D"]) -> None:
        self._x, self._branch, self._own = value, None, False

    def add(self, gate: Float[Tensor, "B K D"], update: Float[Tensor, "B N D"]) -> None:
        """x ← x + gate·update, with each group's gate."""
        self._settle()
        self._branch = (gate, update)

    def _settle(self) -> None:
        """Carry out the update that waits, if one does."""
        if self._branch is not None:
            self._x, self._branch = _add_gated(self._x, *self._branch, self.groups), None

    def norm(
        self, shift: Float[Tensor, "B K D"], scale: Float[Tensor, "B K D"]
    ) -> Float[Tensor, "B N D"]:
        """norm(x)·(1 + scale) + shift, with each group's scale and shift."""
        tensors = (self._x, shift, scale, *(self._branch or ()))
        if kernels.usable(*tensors):
            (gate, update), self._branch = self._branch or (None, None), None
            arguments = (self._x, gate, update, shift, scale, self.groups.ends)
            if torch.is_grad_enabled():
                self._x, normed = _ResidualNorm.apply(*arguments)
                return normed
            if self._own and gate is not None and not torch.compiler.is_compiling():
                return kernels.residual_norm_into(self._x, *arguments)[0]
            total, normed, _ = kernels.residual_norm(*arguments)
            if gate is not None:
                self._x, self._own = total, True
            return normed
        return _modulate(
            functional.layer_norm(self.x, self.x.shape[-1:], eps=kernels.EPSILON),
            shift,
            scale,
            self.groups,
        )


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        update: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        ends: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        total, normed, moments = kernels.residual_norm(x, gate, update, shift, scale, ends)
        total = x if gate is None else total
        ctx.save_for_backward(total, moments, scale, gate, update)
        ctx.set_materialize_grads(False)
        ctx.ends = ends
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, moments, scale, gate, update = ctx.saved_tensors
        grad_x, grad_gate, grad_update, grad_shift, grad_scale = kernels.residual_norm_backward(
            grad_total, grad, total, moments, gate, update, scale, ctx.ends
        )
        if gate is None:
            return grad_x, None, None, grad_shift, grad_scale, None
        return grad_x, grad_gate, grad_update, grad_shift, grad_scale, None


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, groups: TokenGroups) -> Tensor:
    if torch.compiler.is_compiling():
        return x * groups.broadcast(1 + scale) + groups.broadcast(shift)
    return _Modulate.apply(x, shift, 1 + scale, groups.slices)


def _add_gated(x: Tensor, gate: Tensor, update: Tensor, groups: TokenGroups) -> Tensor:
    if torch.compiler.is_compiling():
        return x + groups.broadcast(gate) * update
    return _AddGated.apply(x, gate, update, groups.slices)


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

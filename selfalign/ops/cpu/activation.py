"""GELU in its tanh form, and its gradient, in one pass each: torch's own is bound by a slow tanh."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.ops.cpu.call import call
from selfalign.ops.cpu.operation import operation


@operation(
    "gelu_backward(Tensor grad, Tensor x) -> Tensor", fake=lambda grad, x: x.new_empty(x.shape)
)
def _gelu_backward(grad: Float[Tensor, "... D"], x: Float[Tensor, "... D"]) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    call("gelu_backward", grad, x, grad_x, x.numel())
    return grad_x


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _gelu_backward(grad, *ctx.saved_tensors)


@operation(
    "gelu(Tensor x) -> Tensor",
    fake=lambda x: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_backward,
)
def gelu(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """GELU in its tanh form."""
    x = x.contiguous()
    out = torch.empty_like(x)
    call("gelu_forward", x, out, x.numel())
    return out

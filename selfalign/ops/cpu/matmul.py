"""Linear layers that reach the rate of a CPU's widest instructions.

torch multiplies float32 matrices on CPUs with MKL, which uses AVX2 on AMD processors; oneDNN, which torch
carries too, uses AVX-512 wherever there is AVX-512 and is up to 2.2 times as fast there
(benchmarks/step.md).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from selfalign.ops.cpu import build
from selfalign.ops.cpu.call import WIDTH, call
from selfalign.ops.cpu.operation import operation

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether oneDNN multiplies float32 matrices faster than torch does on this CPU."""


@operation(
    "linear_gradients(Tensor grad, Tensor x) -> (Tensor, Tensor)",
    fake=lambda grad, x: (
        grad.new_empty(grad.shape[-1], x.shape[-1]),
        grad.new_empty(grad.shape[-1]),
    ),
)
def linear_gradients(
    grad: Float[Tensor, "... N"], x: Float[Tensor, "... K"]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N"]]:
    """gradᵀ·x and the sums of grad's columns: the gradients of a linear layer's weight and bias."""
    outputs, inputs = grad.shape[-1], x.shape[-1]
    if outputs % WIDTH or inputs % WIDTH or not build.available():
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
        return linear(grad.t(), x.t(), None), grad.sum(dim=0)
    grad, x = grad.contiguous(), x.contiguous()
    grad_weight, grad_bias = grad.new_empty(outputs, inputs), grad.new_empty(outputs)
    rows = x.numel() // inputs
    call("linear_gradients", grad, x, grad_weight, grad_bias, rows, outputs, inputs)
    return grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = linear(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:]):  # a frozen layer
        return grad_x, None, None
    return grad_x, *linear_gradients(grad, x)


@operation(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)),
    setup_context=_setup_context,
    backward=_backward,
)
def linear(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, "N"] | None
) -> Float[Tensor, "... N"]:
    """x·Wᵀ + b. Copies x unless it is contiguous; the compiler would copy W too."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

"""Linear layers that reach the rate of a CPU's widest instructions.

torch multiplies float32 matrices on CPUs with MKL, which uses AVX2 on AMD processors; oneDNN, which torch
carries too, uses AVX-512 wherever there is AVX-512 and is up to 2.2 times as fast there
(benchmarks/step.md). On other devices, in other dtypes and under the compiler this is torch's own layer.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether float32 products on this CPU go through oneDNN."""


class Linear(nn.Linear):
    """`torch.nn.Linear`, by the fastest product there is."""

    def forward(self, input: Float[Tensor, "... K"]) -> Float[Tensor, "... N"]:
        """x·Wᵀ + b."""
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "... K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, "N"]
) -> Float[Tensor, "... N"]:
    """`torch.nn.functional.linear`, by the fastest product there is."""
    if (
        ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    ):
        return _OneDnnLinear.apply(x, weight, bias)
    return functional.linear(x, weight, bias)


def product(
    a: Float[Tensor, "M K"], b: Float[Tensor, "N K"], bias: Float[Tensor, "N"] | None = None
) -> Float[Tensor, "M N"]:
    """a·bᵀ + bias of float32 matrices on a CPU, in any layout."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            grad_x = product(rows, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = product(rows.t(), x.flatten(0, -2).t())
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0)
        return grad_x, grad_weight, grad_bias

"""Linear layers that reach the rate of a CPU's widest instructions.

torch multiplies float32 matrices on CPUs with MKL, which uses AVX2 on AMD processors; oneDNN, which torch
carries too, uses AVX-512 wherever there is AVX-512 and is up to 2.2 times as fast there
(benchmarks/step.md). The compiler sees that product as one opaque operation. On other devices and in
other dtypes this is torch's own layer.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from selfalign import kernels
from selfalign.kernels.opaque import opaque

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
    if _goes_through_onednn(x, weight):
        multiply = _OneDnnLinear.apply if torch.is_grad_enabled() else product
        return multiply(x, weight, bias)
    return functional.linear(x, weight, bias)


def gelu_(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """GELU in its tanh form. x is lost where no gradient is needed."""
    if kernels.usable(x):
        if torch.is_grad_enabled():
            return _Gelu.apply(x)
        return kernels.gelu(x) if torch.compiler.is_compiling() else kernels.gelu_(x)
    return functional.gelu(x, approximate="tanh")


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return kernels.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return kernels.gelu_backward(grad, *ctx.saved_tensors)


@opaque(
    "(Tensor a, Tensor b, Tensor? bias=None) -> Tensor",
    lambda a, b, bias=None: a.new_empty(*a.shape[:-1], len(b)),
)
def product(
    a: Float[Tensor, "... K"],
    b: Float[Tensor, "N K"],
    bias: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "... N"]:
    """a·bᵀ + bias of float32 matrices on a CPU. Copies `a` unless it is contiguous.

    Opaque to the compiler, which would otherwise copy `b` unless it is contiguous.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def linear_gradients(
    grad: Float[Tensor, "... N"], x: Float[Tensor, "... K"]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N"]]:
    """gradᵀ·x and the sums of grad's columns: the gradients of a linear layer's weight and bias."""
    if kernels.usable(grad, x):
        return kernels.linear_gradients(grad, x)
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    return product(grad.t(), x.t()), grad.sum(dim=0)


def _goes_through_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):  # a frozen layer
            return grad_x, None, None
        return grad_x, *linear_gradients(grad, x)

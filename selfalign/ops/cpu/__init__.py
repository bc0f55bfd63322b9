"""Compiled kernels for float32 on x86 processors, with their gradients, as operations of torch."""

from selfalign.ops.cpu.activation import gelu
from selfalign.ops.cpu.flash_attention import attention
from selfalign.ops.cpu.matmul import linear
from selfalign.ops.cpu.modulation import gated_residual, modulated_norm

__all__ = [
    "attention",
    "gated_residual",
    "gelu",
    "linear",
    "modulated_norm",
]

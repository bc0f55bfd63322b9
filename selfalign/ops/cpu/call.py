"""Calls the functions of `kernels.cpp`."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from selfalign.ops.cpu import build

WIDTH = 16
"""The kernels work on rows of D numbers if D is a multiple of this."""
_ARGUMENTS = {
    "attention_forward": "aaaaiiii",
    "attention_backward": "aaaaaaiiii",
    "modulated_norm_forward": "aaaiiaaaiiiif",
    "modulated_norm_backward": "aaaaiiaaaaiiii",
    "gated_residual_forward": "aaaiiaaiiii",
    "gated_residual_backward": "aaaiiaaaiiii",
    "gelu_forward": "aai",
    "gelu_backward": "aaai",
    "linear_gradients": "aaaaiii",
}
"""What each function takes: addresses, whole numbers and float32 numbers."""
_TYPES = {"a": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


def call(name: str, *arguments: Any) -> None:
    """Call a kernel; tensors are passed by their addresses."""
    _function(name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


@functools.cache
def _function(name: str) -> Callable[..., None]:
    function = getattr(build.library(), name)
    function.restype, function.argtypes = None, [_TYPES[kind] for kind in _ARGUMENTS[name]]
    return function


def numbers(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """Whole numbers, as the kernels take them."""
    return (ctypes.c_int64 * len(values))(*values)

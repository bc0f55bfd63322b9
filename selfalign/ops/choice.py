"""Which form of an operation a call takes: the one place that is asked, and set."""

import contextlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack

from selfalign.errors import UserError
from selfalign.ops.cpu import build
from selfalign.ops.cpu.call import WIDTH
from selfalign.ops.cpu.matmul import ONEDNN
from selfalign.ops.reference import transforming
from selfalign.settings import OPS

VARIABLE = "SELFALIGN_OPS"
"""The environment variable that holds the choice of a process that makes no other."""

_chosen = "auto"


def use(choice: str, name: str = "ops") -> contextlib.ExitStack:
    """Choose the form of the operations, from now on or for a `with` block.

    Args:
        choice: one of OPS.
        name: what the choice is called where a person made it, for the error.

    Raises:
        UserError: the choice is not one of OPS, or it is `cpu` and there can be no kernels here.
    """
    global _chosen
    if choice not in OPS:
        raise UserError(f"{name} is {choice!r}: allowed are {', '.join(OPS)}")
    if choice == "cpu":
        try:
            build.library()
        except UserError as error:
            raise UserError(f"{name} is 'cpu', and here are no CPU kernels: {error}") from error
    before, _chosen = _chosen, choice
    undo = contextlib.ExitStack()
    undo.callback(use, before)
    return undo


def compiled() -> bool:
    """Whether compiled kernels serve what they can serve."""
    return _chosen != "torch" and build.available()


def kernels_serve(*tensors: Tensor) -> bool:
    """Whether the compiled kernels work on these: ordinary tensors, in rows of whole vectors."""
    if not build.available() or not _ordinary(tensors):
        return False
    return all(tensor.shape[-1] % WIDTH == 0 for tensor in tensors)


def onednn_serves(*tensors: Tensor) -> bool:
    """Whether oneDNN multiplies these: ordinary tensors, on a processor where it is faster."""
    return ONEDNN and _ordinary(tensors)


def _ordinary(tensors: Sequence[Tensor]) -> bool:
    """Whether these are real float32 tensors on a CPU, and nothing but autograd watches them.

    Autocast, transforms, forward-mode differentiation and dispatch modes (which count, fake or trace
    operations) know torch's own operations. The compiler knows ours.
    """
    if _chosen == "torch" or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.compiler.is_compiling() and (transforming() or _len_torch_dispatch_stack()):
        return False
    return all(
        tensor.dtype == torch.float32 and tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter)
        for tensor in tensors
    )


use(os.environ.get(VARIABLE) or "auto", VARIABLE)

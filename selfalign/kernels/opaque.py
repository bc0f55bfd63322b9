"""Functions that torch.compile calls as they are, without looking inside."""

import functools
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("selfalign", "FRAGMENT")


def opaque(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function on a CPU one operation for the compiler; eager code calls it directly.

    The dispatcher, which an operation goes through, would cost a small step more than the work.
    Gradients are the business of the autograd functions that call it.

    Args:
        schema: the operation's arguments and results, as torch.library writes them.
        fake: given the same arguments, returns empty tensors of the results' shapes.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _LIBRARY.define(name + schema, tags=torch.Tag.needs_exact_strides)
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"selfalign::{name}", fake, lib=_LIBRARY)
        operation = getattr(torch.ops.selfalign, name).default

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return (operation if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return decorate

"""Functions that torch.compile calls as they are, without looking inside."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def opaque(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function one operation for the compiler; without it the function is called directly.

    The dispatcher, which an operation goes through, would cost a small step more than the work.

    Args:
        schema: the operation's arguments and results, as torch.library writes them.
        fake: given the same arguments, returns empty tensors of the results' shapes.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"selfalign::{function.__name__}"
        operation = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        operation.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return (operation if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return decorate

"""Functions on real tensors become operations of torch, with their shapes and gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _len_torch_dispatch_stack

from selfalign.errors import UserError

_LIBRARY = torch.library.Library("selfalign", "FRAGMENT")


def operation(
    schema: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register a function on a CPU as one operation of torch, which the compiler does not look into.

    Eager code calls the function directly, or by an autograd function of its own: the dispatcher would
    cost a small step more than the work (benchmarks/step.md).

    Args:
        schema: name, arguments and results, as `torch.library` writes them.
        fake: given the same arguments, returns empty tensors of the results' shapes.
        setup_context, backward: the gradient, as `torch.library.register_autograd` takes it. None for
            what is only called in a backward pass.
    """
    name = schema.partition("(")[0]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema, tags=torch.Tag.needs_exact_strides)
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"selfalign::{name}", fake, lib=_LIBRARY)
        registered = getattr(torch.ops.selfalign, name).default
        apply = function
        if setup_context is not None and backward is not None:
            gradient = _first_derivative(name, backward)
            torch.library.register_autograd(
                f"selfalign::{name}", gradient, setup_context=setup_context, lib=_LIBRARY
            )
            apply = _autograd_function(function, setup_context, gradient)

        def call(*inputs: Any) -> Any:
            if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
                return registered(*inputs)
            return (apply if torch.is_grad_enabled() else function)(*inputs)

        return call

    return decorate


def _first_derivative(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward function, which refuses to be derived: autograd would take it for a constant."""

    def gradient(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise UserError(
                f"the compiled {name} has no second derivative: choose torch's operations with "
                "selfalign.ops.use('torch') or SELFALIGN_OPS=torch"
            )
        return backward(ctx, *grads)

    return gradient


def _autograd_function(
    function: Callable[..., Any],
    setup_context: Callable[..., None],
    gradient: Callable[..., Any],
) -> Callable[..., Any]:
    class Operation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        backward = staticmethod(gradient)

    return Operation.apply

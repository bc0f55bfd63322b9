"""The plain operations are their formulas, and torch's transforms and hooks pass through them."""

from typing import Any

import pytest
import torch
from support import small_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from selfalign import SiT, TokenGroups, make_generator, ops
from selfalign.ops import reference

SIZES = (4, 5)
PARTS = ((0, 1, 0, 9), (1, 3, 0, 4), (1, 3, 4, 9))
"""One whole image, and two in two groups."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=make_generator(seed, "numbers"))


def test_norm_and_residual_are_their_formulas_token_by_token() -> None:
    x, update = numbers(3, 9, 8), numbers(3, 9, 8, seed=1)
    gate, shift, scale = (numbers(3, 2, 8, seed=i) for i in range(2, 5))
    total = reference.gated_residual(x, gate, update, SIZES)
    normed = reference.modulated_norm(total, shift, scale, SIZES)
    for sample in range(3):
        for token in range(9):
            group = int(token >= SIZES[0])
            expected = x[sample, token] + gate[sample, group] * update[sample, token]
            assert torch.allclose(total[sample, token], expected)
            centred = expected - expected.mean()
            norm = centred / (centred.square().mean() + 1e-6).sqrt()
            modulated = norm * (1 + scale[sample, group]) + shift[sample, group]
            assert torch.allclose(normed[sample, token], modulated)


def operations() -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    """Every operation as a function of tensors alone, with tensors."""
    x, condition = numbers(3, 9, 8), numbers(3, 2, 8, seed=1)
    return {
        "linear": (ops.linear, (x, numbers(5, 8), numbers(5))),
        "gelu": (ops.gelu, (x,)),
        "attention": (lambda qkv: ops.attention(qkv, 2, PARTS), (numbers(3, 9, 24),)),
        "modulated_norm": (
            lambda *tensors: ops.modulated_norm(*tensors, SIZES),
            (x, condition, condition + 1),
        ),
        "gated_residual": (
            lambda *tensors: ops.gated_residual(*tensors, SIZES),
            (x, condition, numbers(3, 9, 8, seed=2)),
        ),
    }


@pytest.mark.parametrize("name", operations())
def test_derivatives_of_both_orders_and_directions(name: str) -> None:
    function, tensors = operations()[name]
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", operations())
def test_transforms_agree_with_autograd(name: str, dtype: torch.dtype) -> None:
    """In float32 too, where kernels would be taken outside of transforms."""
    function, tensors = operations()[name]
    tensors = tuple(tensor.to(dtype) for tensor in tensors)
    tangents = tuple(torch.ones_like(tensor) for tensor in tensors)

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors).square().sum()

    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    gradients = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    _, slope = torch.func.jvp(loss, tensors, tangents)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    for gradient, known in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, known, rtol=tolerance, atol=tolerance)
    assert torch.allclose(slope, sum(g.sum() for g in expected), rtol=tolerance, atol=tolerance)
    # and a derivative of the derivative, as in a Hessian-vector product
    curvature = torch.func.jvp(torch.func.grad(loss), tensors, tangents)[1]
    assert curvature.isfinite().all()


def model_and_inputs(dtype: torch.dtype) -> tuple[SiT, tuple[Any, ...]]:
    model = small_model(dtype=dtype, hidden_size=32, heads=2)
    tokens = numbers(3, 24, 2).to(dtype)
    times = torch.tensor([[0.25, 0.75]] * 3, dtype=dtype)
    groups = TokenGroups(None, (10, 14), whole=1, separate=True)
    return model, (tokens, times, torch.tensor([0, 1, 2]), groups, (), ("ap_head",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transforms_pass_through_a_model(dtype: torch.dtype) -> None:
    model, (tokens, *others) = model_and_inputs(dtype)
    parameters = dict(model.named_parameters())

    def velocity(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (tokens, *others))[0]

    tangent = torch.ones_like(tokens)
    out, slope = torch.func.jvp(lambda tokens: velocity(parameters, tokens), (tokens,), (tangent,))
    assert torch.allclose(out, model(tokens, *others)[0], atol=1e-4)
    step = 1e-6 if dtype == torch.float64 else 1e-2
    forward = velocity(parameters, tokens + step * tangent)
    numeric = (forward - velocity(parameters, tokens - step * tangent)) / (2 * step)
    assert torch.allclose(slope, numeric, rtol=1e-2, atol=1e-2)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return velocity(parameters, tokens).square().mean()

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, gradient in gradients.items():
        expected = parameters[name].grad
        if expected is None:  # the projection head
            assert not gradient.any()
        else:
            assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_see_tensors_that_nobody_overwrites(choice: str, grad: bool) -> None:
    model, inputs = model_and_inputs(torch.float32)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: torch.nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
        assert isinstance(out, Tensor) and out.requires_grad == grad
        tensors = [out, *(a for a in arguments if isinstance(a, Tensor))]
        seen.extend((tensor, tensor.detach().clone()) for tensor in tensors)

    for module in model.modules():
        if type(module) not in (SiT, torch.nn.ModuleList):
            module.register_forward_hook(keep)
    with ops.use(choice), torch.set_grad_enabled(grad):
        output = model(*inputs)
        if grad:
            (output.velocity.sum() + output.projected["ap_head"].sum()).backward()
    assert len(seen) > 3 * 10
    assert all(torch.equal(tensor, copy) for tensor, copy in seen)


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_a_hook_can_replace_what_a_block_returns(choice: str) -> None:
    model, inputs = model_and_inputs(torch.float32)
    with ops.use(choice), torch.no_grad():
        plain = model(*inputs).velocity
        handle = model.blocks[1].register_forward_hook(lambda *call: 2 * call[-1])
        changed = model(*inputs).velocity
        handle.remove()
        assert not torch.allclose(changed, plain)
        assert torch.equal(model(*inputs)[0], plain)

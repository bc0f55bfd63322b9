"""The linear layer is torch's, whichever library multiplies."""

import pytest
import torch

from selfalign import ops
from selfalign.ops import cpu, reference
from selfalign.ops.choice import ONEDNN
from selfalign.ops.modules import Linear


@pytest.mark.skipif(not ONEDNN, reason="torch multiplies on this CPU")
@pytest.mark.parametrize("outputs", [3, 11, 16])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 1, 1, 7), (4096, 7), (9, 32)])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_torchs(
    shape: tuple[int, ...], transposed: bool, outputs: int
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(outputs, shape[-1]), torch.randn(outputs)
    if transposed:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    grad = torch.randn(*shape[:-1], outputs)
    results = []
    for form, dtype in ((cpu, torch.float32), (reference, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        out = form.linear(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for own, other in zip(*results, strict=True):
        assert torch.allclose(own.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_frozen_parts_get_no_gradient(choice: str) -> None:
    layer = Linear(3, 2)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 3)
    with ops.use(choice):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((2,), 4.0))
    assert x.grad is None


def test_keeps_the_precision_it_is_given() -> None:
    layer = Linear(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(4, 3)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(4, 3).double()).dtype == torch.float64


def test_both_ways_agree() -> None:
    layer, x = Linear(96, 384), torch.randn(64, 96)
    first = layer(x)
    with ops.use("torch"):
        assert torch.allclose(layer(x), first, atol=1e-5)

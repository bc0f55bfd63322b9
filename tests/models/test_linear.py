"""The linear layer is torch's, whichever library multiplies."""

import pytest
import torch
from torch.nn import functional

from selfalign.models import linear
from selfalign.models.linear import Linear, gelu_


@pytest.mark.skipif(not linear.ONEDNN, reason="this CPU's products are torch's own")
@pytest.mark.parametrize("outputs", [3, 11])  # the narrower side is transposed
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 1, 1, 7), (4096, 7)])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_torchs(
    shape: tuple[int, ...], transposed: bool, outputs: int
) -> None:
    torch.manual_seed(0)
    layer, reference = Linear(7, outputs), torch.nn.Linear(7, outputs).double()
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    if transposed:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, expected = layer(x), reference(exact)
    grad = torch.randn(out.shape)
    out.backward(grad)
    expected.backward(grad.double())
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.allclose(x.grad.double(), exact.grad, atol=1e-5)
    for own, other in zip(layer.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(own.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_frozen_parts_get_no_gradient() -> None:
    layer = Linear(3, 2)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 3)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((2,), 4.0))
    assert x.grad is None


def test_autocast_and_float64_go_through_torch() -> None:
    layer = Linear(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(4, 3)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(4, 3).double()).dtype == torch.float64


def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(96, 384), torch.randn(64, 96)
    first = layer(x)
    monkeypatch.setattr(linear, "ONEDNN", False)
    assert torch.allclose(layer(x), first, atol=1e-5)


def test_gelu_is_the_same_with_and_without_gradients() -> None:
    x = 3 * torch.randn(64, 384)
    expected = functional.gelu(x.double(), approximate="tanh")
    with torch.no_grad():
        assert torch.allclose(gelu_(x.clone()).double(), expected, atol=1e-6)
    assert torch.equal(gelu_(x.requires_grad_()), gelu_(x.detach().clone()))

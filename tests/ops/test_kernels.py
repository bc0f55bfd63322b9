"""The compiled kernels are the reference, forward and backward, on every kind of CPU."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import randomize
from torch import Tensor
from torch.nn import functional

from selfalign import SiT, TokenGroups, ops
from selfalign.errors import UserError
from selfalign.heads import ProjectionHead
from selfalign.ops import cpu, reference
from selfalign.ops.cpu import build, call

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="no kernels on this machine")

TOLERANCE = 5e-6
"""Relative to the largest number of a result."""
REGISTERED = torch.ops.selfalign


@pytest.fixture(params=["native", "haswell"], autouse=True)
def processor(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory
) -> Iterator[None]:
    """The kernels built for this processor, and for any with AVX2."""
    if request.param != "native":
        flags = [flag.replace("native", request.param) for flag in build.FLAGS]
        path = tmp_path_factory.getbasetemp() / f"{request.param}.so"
        if not path.exists():
            monkeypatch.setattr(build, "FLAGS", flags)
            build._compile(path)
        monkeypatch.setattr(build, "library", lambda: ctypes.CDLL(str(path)))
        call._function.cache_clear()
    yield
    call._function.cache_clear()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_close(measured: Tensor, expected: Tensor) -> None:
    assert measured.shape == expected.shape
    error = (measured.double() - expected).abs().max()
    assert error <= TOLERANCE * max(1.0, float(expected.abs().max()))


def assert_is_the_reference(name: str, inputs: tuple[Tensor, ...], *settings: Any) -> None:
    """Values and gradients of `cpu` in float32 are those of `reference` in float64."""
    results = []
    for form, dtype in ((cpu, torch.float32), (reference, torch.float64)):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        out = getattr(form, name)(*leaves, *settings)
        grad = numbers(*out.shape, seed=7).to(dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for measured, expected in zip(*results, strict=True):
        assert_close(measured, expected)


@pytest.mark.parametrize("features", [8, 32, 64, 72])
@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (1, ((0, 2, 0, 1),)),
        (33, ((0, 2, 0, 33),)),
        (50, ((0, 2, 0, 17), (0, 2, 17, 50))),
        (300, ((0, 1, 0, 300), (1, 2, 0, 128), (1, 2, 128, 300))),  # more than a tile of keys
    ],
)
def test_attention(features: int, tokens: int, parts: tuple[ops.Part, ...]) -> None:
    heads = 4 if features == 8 else 2
    assert_is_the_reference(
        "attention", (2 * numbers(2, tokens, 3 * heads * features),), heads, parts
    )


def test_attention_of_large_scores_does_not_overflow() -> None:
    qkv = (100 * numbers(1, 40, 3 * 64)).requires_grad_()
    expected = reference.attention(qkv.double(), 2, ((0, 1, 0, 40),))
    out = cpu.attention(qkv, 2, ((0, 1, 0, 40),))
    # A score of 10^5 has a rounding error of 4e-3, which the softmax sees.
    assert (out.double() - expected).abs().max() < 0.1 * expected.abs().max()
    out.sum().backward()
    assert qkv.grad.isfinite().all()


SIZES = [(7,), (3, 67), (1, 1, 1, 197)]


def tokens_and_conditions(
    sizes: tuple[int, ...], width: int, side_by_side: bool
) -> tuple[Tensor, ...]:
    """x, update, gate, shift and scale, as a block has them or with their features far apart."""
    x, update = numbers(2, sum(sizes), width) + 3, numbers(2, sum(sizes), width, seed=1)
    gate, shift, scale = numbers(2, len(sizes), 6 * width, seed=2).chunk(6, dim=-1)[1:4]
    if not side_by_side:
        shift = shift.transpose(0, 2).contiguous().transpose(0, 2)
    return x, update, gate, shift, scale


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", [16, 96, 384])
def test_norms_and_residuals(width: int, sizes: tuple[int, ...], side_by_side: bool) -> None:
    x, update, gate, shift, scale = tokens_and_conditions(sizes, width, side_by_side)
    assert_is_the_reference("modulated_norm", (x, shift, scale), sizes)
    assert_is_the_reference("gated_residual", (x, gate, update), sizes)


def test_gelu() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4096), torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4])])
    assert_is_the_reference("gelu", (functional.pad(x, (0, -len(x) % 16))[None],))


@pytest.mark.parametrize("rows", [1, 256, 777])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (96, 384), (1152, 112), (272, 528)])
def test_linear_gradients(rows: int, outputs: int, inputs: int) -> None:
    grad, x = numbers(rows, outputs), numbers(rows, inputs, seed=1)
    weight, bias = REGISTERED.linear_gradients(grad, x)
    assert_close(weight, grad.double().t() @ x.double())
    assert_close(bias, grad.double().sum(dim=0))


def test_numbers_that_are_not_finite_stay_so() -> None:
    """A step whose loss is not finite has to be seen as such."""
    qkv, x, parts = numbers(1, 40, 3 * 64), numbers(1, 40, 32), ((0, 1, 0, 40),)
    qkv[0, 5, 128 + 35] = torch.nan  # a value of the second head
    assert cpu.attention(qkv, 2, parts)[0, :, 35].isnan().all()
    qkv[0, 5, 35] = torch.nan  # a query
    assert cpu.attention(qkv, 2, parts)[0, 5, 32:].isnan().all()
    x[0, 3, 4] = torch.nan
    condition = torch.zeros(1, 1, 32)
    assert cpu.modulated_norm(x, condition, condition, (40,))[0, 3].isnan().all()
    assert cpu.gated_residual(x, condition, x, (40,))[0, 3, 4].isnan()
    assert cpu.gelu(x)[0, 3, 4].isnan()
    assert REGISTERED.gelu_backward(torch.ones_like(x), x)[0, 3, 4].isnan()
    weight, bias = REGISTERED.linear_gradients(x[0], torch.ones(40, 16))
    assert weight[4].isnan().all() and bias[4].isnan()


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_numbers_do_not_depend_on_the_threads(two_threads: None) -> None:
    sizes, parts = (20, 70), ((0, 3, 0, 20), (0, 3, 20, 90))

    def everything() -> list[Tensor]:
        qkv, x, update = numbers(3, 90, 288), numbers(3, 90, 96), numbers(3, 90, 96, seed=1)
        condition = numbers(3, 2, 96)
        leaves = [tensor.requires_grad_() for tensor in (qkv, x, update, condition)]
        outs = [
            cpu.attention(qkv, 3, parts),
            cpu.modulated_norm(x, condition, condition, sizes),
            cpu.gated_residual(x, condition, update, sizes),
        ]
        linear = REGISTERED.linear_gradients(x.detach(), update.detach())
        return [*outs, *linear, *torch.autograd.grad(outs, leaves, outs)]

    many = everything()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(many, everything(), strict=True))


HEADS = ("ap_head",)


def small_sit() -> tuple[SiT, tuple[Any, ...]]:
    settings = {"channels": 1, "image_size": (8, 8), "patch_size": 2, "num_classes": 3}
    model = SiT(**settings, hidden_size=64, depth=3, heads=2)
    model.add_head("ap_head", ProjectionHead(64), tap=2)
    randomize(model, std=0.1)
    groups = TokenGroups(torch.stack([torch.randperm(16)] * 3), (5, 11), whole=1, separate=True)
    inputs = (numbers(3, 16, 4), torch.rand(3, 2), torch.tensor([0, 1, 3]), groups, (), HEADS)
    return model, inputs


def run(model: Callable[..., Any], parameters: list[Tensor], inputs: tuple[Any, ...]) -> list[Any]:
    output = model(*inputs)
    velocity, features = output.velocity, output.projected["ap_head"]
    loss = velocity.square().mean() + features.square().mean()
    return [velocity.detach(), features.detach(), *torch.autograd.grad(loss, parameters)]


def test_a_model_is_the_same_without_kernels() -> None:
    model, inputs = small_sit()
    parameters = list(model.parameters())
    fused = run(model, parameters, inputs)
    with torch.no_grad():
        assert torch.equal(model(*inputs).velocity, fused[0])
    with ops.use("torch"):
        plain = run(model, parameters, inputs)
    for own, other in zip(fused, plain, strict=True):
        assert (own - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


def test_the_compiler_sees_whole_operations() -> None:
    """One graph, with the same numbers."""
    model, inputs = small_sit()
    parameters = list(model.parameters())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for own, other in zip(
        run(compiled, parameters, inputs), run(model, parameters, inputs), strict=True
    ):
        assert torch.allclose(own, other, atol=1e-6)


def forward_calls() -> dict[str, tuple[Any, ...]]:
    """Every operation that has a gradient, with arguments."""
    qkv, x, update = numbers(2, 9, 96), numbers(2, 9, 32), numbers(2, 9, 32, seed=1)
    gate, shift, scale = (numbers(2, 2, 32, seed=i) for i in range(3))
    weight, bias = numbers(16, 32), numbers(16)
    calls = {
        "attention": (qkv, 2, [0, 2, 0, 9]),
        "modulated_norm": (x, shift, scale, [4, 5]),
        "gated_residual": (x, gate, update, [4, 5]),
        "gelu": (x,),
    }
    return calls | ({"linear": (x, weight, bias)} if ops.choice.ONEDNN else {})


def backward_calls() -> dict[str, tuple[Any, ...]]:
    """Every operation that only a backward pass calls, with arguments."""
    qkv, x, grad = numbers(2, 9, 96), numbers(2, 9, 32), numbers(2, 9, 32, seed=1)
    condition, moments = numbers(2, 2, 32), numbers(2, 9, 2)
    attended, log_sums = REGISTERED.attention(qkv, 2, [0, 2, 0, 9])
    return {
        "attention_backward": (grad, qkv, attended, log_sums, [0, 2, 0, 9]),
        "modulated_norm_backward": (grad, x, moments, condition, [4, 5]),
        "gated_residual_backward": (grad, condition, x, [4, 5]),
        "gelu_backward": (grad, x),
        "linear_gradients": (grad, x),
    }


def with_gradients(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in arguments)


def test_torch_agrees_with_every_registration() -> None:
    """Schemas, shapes of fake results, gradients."""
    for name, arguments in forward_calls().items():
        torch.library.opcheck(getattr(REGISTERED, name).default, with_gradients(arguments))
    for name, arguments in backward_calls().items():
        torch.library.opcheck(getattr(REGISTERED, name).default, arguments)


def eager(name: str) -> Callable[..., Any]:
    """What eager code calls, with flat parts as the registered operation takes them."""
    if name == "attention":
        return lambda qkv, heads, parts: cpu.attention(qkv, heads, (tuple(parts),))
    return getattr(cpu, name)


@pytest.mark.parametrize("name", forward_calls())
def test_eager_code_and_the_dispatcher_compute_the_same(name: str) -> None:
    results = []
    for function in (eager(name), getattr(REGISTERED, name)):
        arguments = with_gradients(forward_calls()[name])
        leaves = [a for a in arguments if isinstance(a, Tensor)]
        out = function(*arguments)
        out = out if isinstance(out, Tensor) else out[0]
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        results.append([out, *gradients])
    for own, other in zip(*results, strict=True):
        assert (own is None and other is None) or torch.equal(own, other)


@pytest.mark.parametrize("way", ["eager", "dispatcher"])
@pytest.mark.parametrize("name", forward_calls())
def test_a_second_derivative_is_refused(name: str, way: str) -> None:
    """Also where the gradient that comes in is a constant, and only the inputs could be derived by."""
    function = eager(name) if way == "eager" else getattr(REGISTERED, name)
    arguments = with_gradients(forward_calls()[name])
    out = function(*arguments)
    out = out if isinstance(out, Tensor) else out[0]
    with pytest.raises(UserError, match=f"compiled {name} has no second derivative.*use"):
        torch.autograd.grad(out.sum(), arguments[0], create_graph=True)


@pytest.mark.parametrize("name", forward_calls())
def test_inputs_are_left_alone(name: str) -> None:
    for grad in (True, False):
        arguments = forward_calls()[name]
        with torch.set_grad_enabled(grad):
            eager(name)(*(with_gradients(arguments) if grad else arguments))
        for own, other in zip(arguments, forward_calls()[name], strict=True):
            assert not isinstance(own, Tensor) or torch.equal(own, other)


def test_shapes_that_do_not_fit_are_refused() -> None:
    """The kernels would read what is not theirs."""
    x, condition = numbers(2, 9, 32), numbers(2, 2, 32)
    for sizes in ((4, 4), (9,), (10, -1)):
        with pytest.raises(ValueError, match="groups"):
            cpu.modulated_norm(x, condition, condition, sizes)
        with pytest.raises(ValueError, match="groups"):
            cpu.gated_residual(x, condition, x, sizes)
    with pytest.raises(ValueError, match="condition"):
        cpu.modulated_norm(x, condition, condition[:1], (4, 5))
    with pytest.raises(ValueError, match="update"):
        cpu.gated_residual(x, condition, x[:, :4], (4, 5))
    for parts in (((0, 2, 0, 8),), ((0, 2, 0, 9), (1, 2, 0, 9)), ((0, 3, 0, 9),), ((0, 2, 0, 10),)):
        with pytest.raises(ValueError, match="part"):
            cpu.attention(numbers(2, 9, 96), 2, parts)
    with pytest.raises(ValueError, match="heads"):
        cpu.attention(numbers(2, 9, 96), 5, ((0, 2, 0, 9),))

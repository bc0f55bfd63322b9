"""The compiled kernels are the formulas of torch, forward and backward, on every kind of CPU."""

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import randomize
from torch import Tensor
from torch.nn import functional

from selfalign import SiT, TokenGroups, kernels
from selfalign.kernels import build
from selfalign.models.modulation import ResidualStream

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels on this machine")

TOLERANCE = 5e-6
"""Relative to the largest number of a result."""


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
            build._compile(shutil.which("g++"), path)
        monkeypatch.setattr(kernels, "library", lambda: ctypes.CDLL(str(path)))
        kernels._function.cache_clear()
    yield
    kernels._function.cache_clear()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def exact(function: Callable[..., Tensor], *inputs: Tensor, grad: Tensor) -> list[Tensor]:
    """The function's value and gradients, in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def assert_close(measured: Tensor, expected: Tensor) -> None:
    assert measured.shape == expected.shape
    error = (measured.double() - expected).abs().max()
    assert error <= TOLERANCE * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("features", [8, 32, 64, 72])
@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        (1, (0, 2, 0, 1)),
        (33, (0, 2, 0, 33)),
        (50, (0, 2, 0, 17, 0, 2, 17, 50)),
        (300, (0, 1, 0, 300, 1, 2, 0, 128, 1, 2, 128, 300)),  # more than a tile of keys
    ],
)
def test_attention(features: int, tokens: int, parts: tuple[int, ...]) -> None:
    qkv, grad = 2 * numbers(2, tokens, 9 * features), numbers(2, tokens, 3 * features)

    def attend(qkv: Tensor) -> Tensor:
        qkv = qkv.unflatten(2, (3, 3, features))
        out = torch.zeros(2, tokens, 3, features, dtype=qkv.dtype)
        for first, end, begin, stop in zip(*(parts[i::4] for i in range(4)), strict=True):
            q, k, v = qkv[first:end, begin:stop].permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) / features**0.5
            out[first:end, begin:stop] = (scores.softmax(-1) @ v).transpose(1, 2)
        return out.flatten(2)

    expected, gradient = exact(attend, qkv, grad=grad)
    out, log_sums = kernels.attention(qkv, 3, parts)
    assert_close(out, expected)
    assert_close(kernels.attention_backward(grad, qkv, out, log_sums, parts), gradient)


def test_attention_of_large_scores_does_not_overflow() -> None:
    qkv = 100 * numbers(1, 40, 3 * 64)
    q, k, v = qkv.double().unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    expected = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out, log_sums = kernels.attention(qkv, 2, (0, 1, 0, 40))
    # A score of 10^5 has a rounding error of 4e-3, which the softmax sees.
    assert (out.double() - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.isfinite(kernels.attention_backward(out, qkv, out, log_sums, (0, 1, 0, 40))).all()


def stream(ends: tuple[int, ...], x: Tensor, *tensors: Tensor) -> Tensor:
    """The sum and its modulated norm, side by side; `tensors` may begin with gate and update."""
    sizes = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    groups = TokenGroups(None, tuple(sizes))
    *branch, shift, scale = tensors
    if branch:
        x = x + groups.broadcast(branch[0]) * branch[1]
    normed = functional.layer_norm(x, x.shape[-1:], eps=kernels.EPSILON)
    normed = normed * (1 + groups.broadcast(scale)) + groups.broadcast(shift)
    return torch.stack([x, normed])


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("ends", [(7,), (3, 70), (1, 2, 3, 200)])
@pytest.mark.parametrize("width", [16, 96, 384])
@pytest.mark.parametrize("gated", [True, False])
def test_residual_norm(gated: bool, width: int, ends: tuple[int, ...], side_by_side: bool) -> None:
    tokens, groups = ends[-1], len(ends)
    x, update = numbers(2, tokens, width) + 3, numbers(2, tokens, width, seed=1)
    modulation = numbers(2, groups, 6 * width, seed=2)
    gate, shift, scale = modulation.chunk(6, dim=-1)[1:4]
    if not side_by_side:  # features far apart, as a transposed result has them
        shift = shift.transpose(0, 2).contiguous().transpose(0, 2)
    branch = (gate, update) if gated else (None, None)
    inputs = [x, *(branch if gated else ()), shift, scale]
    grad = numbers(2, 2, tokens, width, seed=3)
    expected, *gradients = exact(lambda *tensors: stream(ends, *tensors), *inputs, grad=grad)

    total, normed, moments = kernels.residual_norm(x, *branch, shift, scale, ends)
    total = total if gated else x
    assert_close(total, expected[0])
    assert_close(normed, expected[1])
    measured = kernels.residual_norm_backward(
        grad[0], grad[1], total, moments, *branch, scale, ends
    )
    measured = measured if gated else (measured[0], *measured[3:])
    for own, other in zip(measured, gradients, strict=True):
        assert_close(own, other)


def test_the_sums_gradient_may_be_missing() -> None:
    x, condition, grad = numbers(2, 5, 32), numbers(2, 1, 32), numbers(2, 5, 32, seed=1)
    _, _, moments = kernels.residual_norm(x, None, None, condition, condition, (5,))
    arguments = (grad, x, moments, None, None, condition, (5,))
    without = kernels.residual_norm_backward(None, *arguments)
    with_zeros = kernels.residual_norm_backward(torch.zeros_like(x), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(without, with_zeros, strict=True))


def test_gelu() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4096), torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4])])
    x = functional.pad(x, (0, -len(x) % 16))[None]
    grad = numbers(*x.shape)
    expected, gradient = exact(lambda x: functional.gelu(x, approximate="tanh"), x, grad=grad)
    assert_close(kernels.gelu(x), expected)
    assert_close(kernels.gelu_backward(grad, x), gradient)


@pytest.mark.parametrize("rows", [1, 256, 777])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (96, 384), (1152, 112), (272, 528)])
def test_linear_gradients(rows: int, outputs: int, inputs: int) -> None:
    grad, x = numbers(rows, outputs), numbers(rows, inputs, seed=1)
    weight, bias = kernels.linear_gradients(grad, x)
    assert_close(weight, grad.double().t() @ x.double())
    assert_close(bias, grad.double().sum(dim=0))


def test_numbers_that_are_not_finite_stay_so() -> None:
    """A step whose loss is not finite has to be seen as such."""
    qkv, x = numbers(1, 40, 3 * 64), numbers(1, 40, 32)
    qkv[0, 5, 128 + 35] = torch.nan  # a value of the second head
    assert kernels.attention(qkv, 2, (0, 1, 0, 40))[0][0, :, 35].isnan().all()
    qkv[0, 5, 35] = torch.nan  # a query
    assert kernels.attention(qkv, 2, (0, 1, 0, 40))[0][0, 5, 32:].isnan().all()
    x[0, 3, 4] = torch.nan
    condition = torch.zeros(1, 1, 32)
    assert kernels.residual_norm(x, None, None, condition, condition, (40,))[1][0, 3].isnan().all()
    assert kernels.gelu(x)[0, 3, 4].isnan()
    assert kernels.gelu_backward(torch.ones_like(x), x)[0, 3, 4].isnan()
    weight, bias = kernels.linear_gradients(x[0], torch.ones(40, 16))
    assert weight[4].isnan().all() and bias[4].isnan()


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_numbers_do_not_depend_on_the_threads(two_threads: None) -> None:
    def everything() -> list[Tensor]:
        qkv, x, grad = numbers(3, 90, 288), numbers(3, 90, 96), numbers(3, 90, 96, seed=1)
        condition, ends, parts = numbers(3, 2, 96), (20, 90), (0, 3, 0, 20, 0, 3, 20, 90)
        out, log_sums = kernels.attention(qkv, 3, parts)
        attention_grad = kernels.attention_backward(out, qkv, out, log_sums, parts)
        total, normed, moments = kernels.residual_norm(
            x, condition, grad, condition, condition, ends
        )
        norm_grads = kernels.residual_norm_backward(
            grad, grad, total, moments, condition, grad, condition, ends
        )
        linear = kernels.linear_gradients(grad, x)
        return [out, log_sums, attention_grad, normed, *norm_grads, *linear]

    many = everything()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(many, everything(), strict=True))


@pytest.mark.parametrize("whole", [0, 1])
def test_a_model_is_the_same_without_kernels(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"channels": 1, "image_size": (8, 8), "patch_size": 2, "num_classes": 3}
    model = SiT(**settings, hidden_size=64, depth=3, heads=2, projection_head=True)
    randomize(model, std=0.1)
    groups = TokenGroups(torch.stack([torch.randperm(16)] * 3), (5, 11), whole=whole, separate=True)
    inputs = (numbers(3, 16, 4), torch.rand(3, 2), torch.tensor([0, 1, 3]), groups, 2)

    def run() -> list[Tensor]:
        velocity, features = model(*inputs)
        model.zero_grad()
        (velocity.square().mean() + features.square().mean()).backward()
        return [velocity.detach(), features.detach(), *(p.grad for p in model.parameters())]

    fused = run()
    with torch.no_grad():
        assert torch.equal(model(*inputs)[0], fused[0])
    monkeypatch.setattr(kernels, "available", lambda: False)
    for own, other in zip(fused, run(), strict=True):
        assert (own - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


def test_without_gradients_memory_is_reused_but_not_what_others_see() -> None:
    x, update, condition = numbers(2, 9, 32), numbers(2, 9, 32, seed=1), numbers(2, 2, 32)
    groups = TokenGroups(None, (4, 5))

    def run() -> tuple[list[Tensor], list[Tensor]]:
        stream, seen, norms = ResidualStream(x, groups), [x], []
        for look in (False, False, True, False, False):
            stream.add(condition, update)
            norms.append(stream.norm(condition, condition))
            if look:
                seen.append(stream.x)
        return norms, [*seen, stream.x]

    original = x.clone()
    with torch.no_grad():
        norms, seen = run()
    expected_norms, expected_seen = run()
    assert torch.equal(x, original)
    for own, other in zip([*norms, *seen], [*expected_norms, *expected_seen], strict=True):
        assert torch.equal(own, other)


class TestBuild:
    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
        monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path))
        build.library.cache_clear()
        yield tmp_path
        build.library.cache_clear()

    def test_compiles_once(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert build.library() is not None
        (made,) = (cache / "kernels").iterdir()
        build.library.cache_clear()
        monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
        assert build.library() is not None
        assert list((cache / "kernels").iterdir()) == [made]

    def test_without_a_compiler_there_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: None)
        assert build.library() is None

    @pytest.mark.parametrize("fault", ["source", "cache"])
    def test_a_failure_is_one_warning(
        self, fault: str, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if fault == "source":
            broken = cache / "broken.cpp"
            broken.write_text("this is not C++\n")
            monkeypatch.setattr(build, "SOURCE", broken)
        else:
            (cache / "kernels").write_text("a file where the folder should be")
        with pytest.warns(
            UserWarning, match="the CPU kernels are not used, training is slower: .+"
        ):
            assert build.library() is None


@pytest.mark.parametrize("gated", [True, False])
def test_the_compiler_knows_the_shapes(gated: bool) -> None:
    """Schema, fake results and real ones of every operation that the compiler calls."""
    operations = torch.ops.selfalign
    qkv, x, grad = numbers(2, 9, 96), numbers(2, 9, 32), numbers(2, 9, 32, seed=1)
    condition, parts, ends = numbers(2, 2, 32), [0, 2, 0, 9], [4, 9]
    gate, update = (condition, grad) if gated else (None, None)
    out, log_sums = kernels.attention(qkv, 2, parts)
    moments = kernels.residual_norm(x, gate, update, condition, condition, ends)[2]
    for operation, arguments in (
        (operations.attention, (qkv, 2, parts)),
        (operations.attention_backward, (grad, qkv, out, log_sums, parts)),
        (operations.residual_norm, (x, gate, update, condition, condition, ends)),
        (
            operations.residual_norm_backward,
            (grad, grad, x, moments, gate, update, condition, ends),
        ),
        (operations.gelu, (x,)),
        (operations.gelu_backward, (grad, x)),
        (operations.linear_gradients, (grad, x)),
    ):
        torch.library.opcheck(operation.default, arguments)

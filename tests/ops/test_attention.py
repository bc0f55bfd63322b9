"""Separated attention is the dense masked attention of Eq. 8 and 9, at any groups and orders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfalign import TokenGroups, make_generator
from selfalign.backbones.sit import sizes
from selfalign.backbones.sit.model import Attention
from selfalign.ops import reference as plain

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=8).map(tuple)


def make_attention(heads: int, qk_norm: bool, seed: int) -> Attention:
    module = Attention(6 * heads, heads, qk_norm).double()
    generator = make_generator(seed, "attention")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator, std=0.5)
    return module


def group_of_token(groups: TokenGroups) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(groups.sizes)), torch.tensor(groups.sizes))


def allowed_pairs(groups: TokenGroups, batch: int) -> Tensor:
    """(B, N, N): whether token i of a sample may attend to token j."""
    ids = group_of_token(groups)
    same = (ids[:, None] == ids[None, :]).expand(batch, -1, -1).clone()
    if not groups.separate:
        same[:] = True
    same[: groups.whole] = True
    return same


def masked_reference(module: Attention, x: Tensor, allowed: Tensor) -> Tensor:
    """softmax(QKᵀ/√d + mask)·V written out, in float64."""
    batch, num_tokens, hidden_size = x.shape
    heads, size = module.heads, hidden_size // module.heads
    q, k, v = (
        part.reshape(batch, num_tokens, heads, size).transpose(1, 2)
        for part in (x @ module.qkv.weight.T + module.qkv.bias).chunk(3, dim=-1)
    )

    def normalise(values: Tensor, norm: torch.nn.Module) -> Tensor:
        if not isinstance(norm, torch.nn.LayerNorm):
            return values
        centred = values - values.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias

    q, k = normalise(q, module.q_norm), normalise(k, module.k_norm)
    scores = (q @ k.transpose(-1, -2)) / size**0.5
    scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, num_tokens, hidden_size)
    return out @ module.proj.weight.T + module.proj.bias


@given(
    sizes=SIZES,
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    qk_norm=st.booleans(),
    separate=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_equals_the_dense_masked_reference(sizes, batch, heads, qk_norm, separate, seed, data):
    whole = data.draw(st.integers(0, batch), label="whole")
    groups = TokenGroups(None, sizes, whole=whole, separate=separate)
    module = make_attention(heads, qk_norm, seed)
    x = torch.randn(
        batch, sum(sizes), 6 * heads, dtype=torch.float64, generator=make_generator(seed, "x")
    ).requires_grad_()
    out = module(x, groups)
    expected = masked_reference(module, x, allowed_pairs(groups, batch))
    assert torch.allclose(out, expected, atol=1e-10)
    # and so are the gradients
    direction = torch.randn(out.shape, dtype=out.dtype, generator=make_generator(seed, "d"))
    inputs = [x, *module.parameters()]
    gradients = torch.autograd.grad((out * direction).sum(), inputs)
    references = torch.autograd.grad((expected * direction).sum(), inputs)
    for gradient, reference in zip(gradients, references, strict=True):
        assert torch.allclose(gradient, reference, atol=1e-8)


@pytest.mark.parametrize("whole", [0, 1, 3])
@pytest.mark.parametrize("sizes", [(4,), (1, 5), (2, 3, 4), (1,) * 8])
def test_information_flows_within_groups_only(sizes, whole):
    groups = TokenGroups(None, sizes, whole=whole, separate=True)
    module = make_attention(2, False, 0)
    x = torch.randn(3, sum(sizes), 12, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x, groups), x)
    reaches = jacobian.abs().amax(dim=(2, 5)) > 0  # (B, N, B, N)
    for sample in range(3):
        assert torch.equal(reaches[sample, :, sample], allowed_pairs(groups, 3)[sample])
        others = [other for other in range(3) if other != sample]
        assert not reaches[sample][:, others].any()


@pytest.mark.parametrize("separate", [False, True])
@given(order=st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_permuting_tokens_within_a_group_permutes_the_output(separate, order):
    order = torch.tensor(order)
    groups = TokenGroups(None, (6, 3), separate=separate)
    module = make_attention(2, True, 1)
    x = torch.randn(2, 9, 12, dtype=torch.float64, generator=make_generator(0, "x"))
    permutation = torch.cat([order, torch.arange(6, 9)])
    assert torch.allclose(module(x[:, permutation], groups), module(x, groups)[:, permutation])


def test_full_attention_ignores_the_slices():
    module = make_attention(2, False, 2)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    one = module(x, TokenGroups(None, (9,)))
    assert torch.allclose(module(x, TokenGroups(None, (2, 3, 4))), one)
    assert torch.allclose(module(x, TokenGroups(None, (2, 3, 4), whole=2, separate=True)), one)


def test_tokens_alone_in_their_groups_attend_to_themselves():
    module = make_attention(2, False, 3)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    out = module(x, TokenGroups(None, (1,) * 5, separate=True))
    values = (x @ module.qkv.weight.T + module.qkv.bias)[..., 24:]
    assert torch.allclose(out, values @ module.proj.weight.T + module.proj.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype_it_is_given(dtype):
    module = make_attention(2, True, 4)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    groups = TokenGroups(None, (4, 5), separate=True)
    expected = module(x, groups)
    out = module.to(dtype)(x.to(dtype), groups)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.3
    assert (out.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("size", sizes.SIZES)
def test_flash_attention_may_take_every_slice(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wants heads of a multiple of eight features, 256 at most, side by side in memory."""
    width, heads = sizes.SIZES[size].hidden_size, sizes.SIZES[size].heads
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend([q, k, v])
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    plain.attention(torch.zeros(2, 16, 3 * width), heads, ((0, 2, 0, 5), (0, 2, 5, 16)))
    assert {tensor.shape[2] for tensor in seen} == {5, 11}
    for tensor in seen:
        assert tensor.shape[3] * heads == width and tensor.stride(3) == 1
        assert tensor.shape[3] % 8 == 0 and tensor.shape[3] <= 256

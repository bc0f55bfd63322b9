"""Attention across groups where it is known: uniform, separated, and as the network itself computed it."""

import dataclasses

import pytest
import torch
from known import Analytic, correlated, gaussian_posterior, gaussian_source
from support import resolved, small_model
from torch import nn

from selfalign import build_student
from selfalign.errors import UserError
from selfalign.inspect.attention import (
    attended,
    cross_noise,
    cross_share,
    share_grid,
    value_norms,
)
from selfalign.inspect.scenes import Scene, make_scene

SIDE = 4
TOKENS = SIDE**2


@pytest.fixture(scope="module")
def scene() -> Scene:
    source = gaussian_source(correlated(SIDE, 2.0), 12)
    config = resolved("sra-dts", channels=1, image_size=(SIDE, SIDE), num_classes=0)
    return make_scene(config, source.heldout, 12, "attention")


def _model(**settings):
    return small_model(channels=1, image_size=(SIDE, SIDE), **settings).eval()


def _seen(model, scene):
    view, _ = scene.view(slice(0, 5), (0.3, 0.8), model)
    return attended(model, view, scene.labels[:5], (1, 2, 3))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_is_the_attention_of_the_networks_own_pass(scene, separate, qk_norm):
    found = _seen(_model(qk_norm=qk_norm), scene.separated(separate))
    for block in found.values():
        assert (block.weights @ block.values - block.output).abs().max() < 1e-6
        assert torch.allclose(block.weights.sum(dim=3), torch.ones(()).double())


def test_watching_changes_nothing(scene):
    model = _model()
    view, _ = scene.view(slice(0, 5), (0.3, 0.8), model)
    before = model(view.tokens, view.timesteps, scene.labels[:5], view.groups).velocity
    _seen(model, scene)
    after = model(view.tokens, view.timesteps, scene.labels[:5], view.groups).velocity
    assert torch.equal(before, after)


def test_uniform_attention_gives_what_counts_let_expect(scene):
    model = _model()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: model.hidden_size] = 0  # W_q
            block.attn.qkv.bias[: model.hidden_size] = 0
    first = scene.groups.sizes[0]
    for share in cross_noise(model, scene, (0.2, 0.7), (1, 3)).values():
        assert share.expected == pytest.approx((1 - first / TOKENS, first / TOKENS))
        for group in (0, 1):
            known = torch.full_like(share.plain[:, group], share.expected[group])
            assert torch.allclose(share.plain[:, group], known)
    grid = share_grid(model, scene, (1,), levels=(0.1, 0.5, 0.9))
    assert torch.allclose(grid.ratios, torch.ones(()).double())
    assert all(abs(value.value) < 1e-12 for _, value in grid.over_gap(0))


def test_separated_groups_give_each_other_nothing(scene):
    for share in cross_noise(_model(), scene.separated(True), (0.2, 0.7), (1, 2)).values():
        assert not share.plain.any() and share.weighted is not None and not share.weighted.any()


def test_a_known_map():
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.0, 0.5, 0.5]])[None, None]
    assert torch.allclose(cross_share(weights, (1, 2))[0, :, 0], torch.tensor([0.5, 0.05]))
    norms = torch.tensor([1.0, 2.0, 0.0])[None, None]
    found = cross_share(weights, (1, 2), norms)[0, :, 0]
    assert torch.allclose(found, torch.tensor([0.6 / 1.1, (0.1 / 1.3) / 2]))


def test_values_count_by_what_they_add_to_the_output(scene):
    """The sum over heads of A_ij·v_j W_O, and the bias, is what the projection makes."""
    model = _model()
    found = _seen(model, scene)[2]
    norms = value_norms(model, 2, found)
    projection = model.blocks[1].attn.proj
    one_head = torch.zeros_like(found.values)
    one_head[:, 1] = found.values[:, 1]
    joined = one_head.transpose(1, 2).flatten(2)
    known = (projection(joined) - projection.bias).norm(dim=2)
    assert torch.allclose(norms[:, 1], known)


def test_attention_to_a_caption_is_another(scene):
    """Only the attention among tokens is watched, however long the caption is."""
    changes = {"model.condition": "text", "conditions.text.length": TOKENS, "model.size": "tiny/1"}
    config = resolved("sra-dts", changes, channels=1, image_size=(SIDE, SIDE), num_classes=3)
    model = build_student(config).double().eval()
    model.describe(["one", "two", "three"])
    found = _seen(model, scene)[1]
    assert (found.weights @ found.values - found.output).abs().max() < 1e-6


def test_own_and_other_group_count_by_their_tokens(scene):
    """A cell is the mean over tokens, each as one of its own group."""
    model, levels = _model(), (0.2, 0.9)
    grid = share_grid(model, scene, (2,), levels)
    found = {pair: cross_noise(model, scene, pair, (2,))[2] for pair in ((0.2, 0.9), (0.9, 0.2))}
    first = scene.groups.sizes[0] / TOKENS
    own = found[0.2, 0.9].plain[:, 0] / found[0.2, 0.9].expected[0]
    other = found[0.9, 0.2].plain[:, 1] / found[0.9, 0.2].expected[1]
    assert torch.allclose(grid.ratios[0, 1, :, 0], first * own + (1 - first) * other)


def test_other_transformers_of_torch(scene):
    """Any module that calls torch's attention is seen; one that attends otherwise is named."""

    class Other(Analytic):
        def __init__(self, grid):
            super().__init__(grid, 0, gaussian_posterior(torch.eye(TOKENS).double()))
            layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
            self.blocks, self.lift = nn.ModuleList([layer]), nn.Linear(1, 8, dtype=torch.float64)

        def transform(self, tokens, timesteps, condition, groups, taps=(), last=None):
            x = self.lift(tokens)
            self.blocks[0](x, x, x, need_weights=True)
            return super().transform(tokens, timesteps, condition, groups, taps, last)

    config = resolved("sra-dts", channels=1, image_size=(SIDE, SIDE), num_classes=0)
    model = Other(config.grid).eval()
    view, _ = scene.view(slice(0, 3), (0.3, 0.8), model)
    with pytest.raises(UserError, match="block 1 does not attend by torch's"):
        attended(model, view, scene.labels[:3], (1,))
    model.blocks[0].forward = lambda x, *_, **__: nn.functional.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None]
    )
    found = attended(model, view, scene.labels[:3], (1,))[1]
    assert found.weights.shape == (3, 1, TOKENS, TOKENS)
    assert value_norms(model, 1, found) is None
    shares = cross_noise(model, dataclasses.replace(scene), (0.1, 0.9), (1,))[1]
    assert shares.weighted is None

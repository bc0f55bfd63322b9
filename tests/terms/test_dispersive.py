"""The dispersive loss: known answers, what it does not see, and its gradient."""

import math

import pytest
import torch
from support import float64_draw, resolved, small_model

from selfalign import Objective, Pass, TokenGroups, UserError
from selfalign.network import Output
from selfalign.terms.dispersive import Dispersive
from selfalign.tokens import one_group
from selfalign.views import View, Views

TAP = 2


def loss_of(features, groups=None, **settings):
    """The term on given features (B, N, D)."""
    config = resolved("sit", {"objective.terms": ("dispersive",)})
    view = View(None, None, groups or one_group(features.shape[1]))
    views = Views(None, None, None, view, None)
    output = Output(None, {TAP: features}, {})
    term = Dispersive(**{"block": TAP, **settings})
    return term(Pass(config, None, None, None, None, views, output, None))


class TestKnownAnswers:
    @pytest.mark.parametrize("batch", [1, 2, 7])
    def test_identical_samples_have_none(self, batch):
        features = torch.randn(1, 5, 3).expand(batch, -1, -1)
        assert loss_of(features).item() == pytest.approx(0, abs=1e-4)

    @pytest.mark.parametrize("batch", [2, 5])
    def test_samples_far_apart_keep_only_their_pairs_with_themselves(self, batch):
        features = 1e3 * torch.arange(batch)[:, None, None].expand(-1, 5, 3).float()
        assert loss_of(features).item() == pytest.approx(math.log(1 / batch), abs=1e-6)

    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_is_its_definition(self, temperature):
        features = torch.randn(4, 5, 3)
        pairs = [
            math.exp(-(a - b).square().mean().item() / temperature)
            for a in features.flatten(1)
            for b in features.flatten(1)
        ]
        expected = math.log(sum(pairs) / 16)
        assert loss_of(features, temperature=temperature).item() == pytest.approx(
            expected, abs=1e-5
        )


def test_the_order_of_tokens_and_of_samples_does_not_matter():
    features = torch.randn(4, 6, 3)
    expected = loss_of(features)
    order = torch.stack([torch.randperm(6) for _ in range(4)])
    groups = TokenGroups(order, (2, 4))
    # Every sample in a group order of its own: samples are compared in image order.
    assert torch.allclose(loss_of(groups.sort(features), groups), expected, atol=1e-6)
    same = torch.randperm(6)
    assert torch.allclose(loss_of(features[:, same]), expected, atol=1e-6)
    assert torch.allclose(loss_of(features[torch.randperm(4)]), expected, atol=1e-6)


def test_gradients_are_finite_and_push_samples_apart():
    features = torch.randn(4, 6, 3).requires_grad_()
    loss = loss_of(features)
    loss.backward()
    assert features.grad.isfinite().all() and features.grad.any()
    with torch.no_grad():
        moved = features - 0.1 * features.grad
    assert (torch.cdist(moved.flatten(1), moved.flatten(1)).sum()) > torch.cdist(
        features.flatten(1), features.flatten(1)
    ).sum()
    same = torch.ones(3, 2, 2, requires_grad=True)
    loss_of(same).backward()
    assert same.grad.isfinite().all()


def test_is_computed_in_float32_under_autocast():
    features = torch.randn(4, 6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss_of(features.bfloat16())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(loss_of(features.bfloat16().float()).item(), abs=1e-4)


@pytest.mark.parametrize("name", ["sit", "sra-dts-as"])
def test_is_a_term_of_the_objective(name):
    settings = {"terms.dispersive.block": 1, "terms.dispersive.weight": 0.3}
    blocks = {"terms.alignment.block": 1, "targets.ema.block": 2}
    changes = {"objective.terms": ("dispersive",), **settings, **blocks}
    config = resolved(name, changes, channels=2, image_size=(4, 6))
    student, teacher = small_model(0, head_after=1), small_model(1)
    x0 = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    draw, labels = float64_draw(config, (3, 2, 4, 6)), torch.tensor([0, 3, 4])
    objective = Objective(config)
    losses = objective(student, teacher, x0, labels, draw)
    forward = objective.predict(student, teacher, x0, labels, draw)
    features = forward.views.groups.restore(forward.output.features[1])
    assert torch.allclose(losses.terms["dispersive"], loss_of(features))
    expected = losses.terms["denoising"].mean() + 0.3 * losses.terms["dispersive"]
    if name != "sit":
        expected = expected + 0.5 * losses.terms["alignment"]
    assert torch.allclose(losses.total, expected)
    losses.total.backward()
    assert student.blocks[0].attn.qkv.weight.grad.any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, ["terms.dispersive.temperature", "0.0", "above 0"]),
        ({"weight": -1.0}, ["terms.dispersive.weight", "-1.0"]),
        ({"block": 7}, ["terms.dispersive.block", "7", "1 to 6"]),
    ],
)
def test_refused(settings, words):
    changes = {f"terms.dispersive.{name}": value for name, value in settings.items()}
    with pytest.raises(UserError) as error:
        resolved("sit", {"objective.terms": ("dispersive",), **changes})
    assert [word for word in words if word not in str(error.value)] == []

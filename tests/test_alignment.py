"""The distances of Eq. 3 against their definitions, and the teacher's pass."""

import math

import pytest
import torch
from support import float64_draw, resolved, small_model

from selfalign.alignment import DISTANCES, teacher_features
from selfalign.views import make_views


def by_hand(name, a, b):
    """The definitions in plain Python, over nested lists."""
    batch, tokens, width = a.shape
    a, b = a.tolist(), b.tolist()

    def dot(u, v):
        return sum(x * y for x, y in zip(u, v, strict=True))

    def cosine(u, v):
        return dot(u, v) / math.sqrt(dot(u, u) * dot(v, v))

    if name == "cosine":
        values = [1 - cosine(a[i][n], b[i][n]) for i in range(batch) for n in range(tokens)]
    elif name == "cosine-over-tokens":
        values = [
            1 - cosine([row[d] for row in a[i]], [row[d] for row in b[i]])
            for i in range(batch)
            for d in range(width)
        ]
    else:
        beta = 0.05
        pointwise = {
            "l1": abs,
            "l2": lambda x: x * x,
            "smooth-l1": lambda x: x * x / 2 / beta if abs(x) < beta else abs(x) - beta / 2,
        }[name]
        values = [
            pointwise(a[i][n][d] - b[i][n][d])
            for i in range(batch)
            for n in range(tokens)
            for d in range(width)
        ]
    return sum(values) / len(values)


@pytest.mark.parametrize("name", sorted(DISTANCES))
@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_is_its_definition(name, spread):
    a = torch.randn(2, 5, 3, dtype=torch.float64)
    b = a + spread * torch.randn(2, 5, 3, dtype=torch.float64)
    assert DISTANCES[name](a, b).item() == pytest.approx(by_hand(name, a, b), abs=1e-12)


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_is_zero_at_the_same_features_and_symmetric(name):
    a, b = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    assert DISTANCES[name](a, a).item() == pytest.approx(0, abs=1e-12)
    assert DISTANCES[name](a, b).item() == pytest.approx(DISTANCES[name](b, a).item())
    assert DISTANCES[name](a, b) > 0


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_does_not_depend_on_the_order_of_tokens(name):
    # The losses compare in group order and never sort back.
    a, b = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    order = torch.randperm(5)
    assert torch.allclose(DISTANCES[name](a[:, order], b[:, order]), DISTANCES[name](a, b))


def test_cosine_is_per_token_and_does_not_see_its_length():
    a, b = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    lengths = torch.rand(2, 5, 1, dtype=torch.float64) + 0.1
    assert torch.allclose(DISTANCES["cosine"](a * lengths, b), DISTANCES["cosine"](a, b))
    over_tokens = DISTANCES["cosine-over-tokens"]
    assert not torch.allclose(over_tokens(a * lengths, b), over_tokens(a, b))
    # the other one is per channel
    lengths = torch.rand(2, 1, 3, dtype=torch.float64) + 0.1
    assert torch.allclose(over_tokens(a * lengths, b), over_tokens(a, b))


def test_every_distance_is_reachable_from_the_config():
    for name in DISTANCES:
        assert resolved("sra", {"alignment.distance": name}).alignment.distance == name


class TestTeacher:
    def make(self, name="sra-dts-as"):
        config = resolved(name, channels=2, image_size=(4, 6))
        draw = float64_draw(config, (3, 2, 4, 6))
        x0 = torch.randn(3, 2, 4, 6, dtype=torch.float64)
        return small_model(), make_views(config, x0, draw).teacher, torch.tensor([0, 3, 5])

    @pytest.mark.parametrize("block", [1, 2, 3])
    def test_runs_no_block_after_its_own(self, block):
        teacher, view, labels = self.make()
        ran = []
        for number, module in enumerate(teacher.blocks, start=1):
            module.register_forward_hook(lambda *_, number=number: ran.append(number))
        teacher.final_layer.register_forward_hook(lambda *_: ran.append("final"))
        expected = teacher_features(teacher, view, labels, block)
        assert ran == list(range(1, block + 1))
        # and what it does not run cannot matter
        with torch.no_grad():
            for module in [*teacher.blocks[block:], teacher.final_layer, teacher.ap_head]:
                for parameter in module.parameters():
                    parameter.fill_(torch.nan)
        assert torch.equal(teacher_features(teacher, view, labels, block), expected)

    def test_gets_no_gradient(self):
        teacher, view, labels = self.make()
        assert not teacher_features(teacher, view, labels, 2).requires_grad
        assert torch.is_grad_enabled()

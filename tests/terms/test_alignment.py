"""The distances of Eq. 3 against their definitions, and what the alignment term is made of."""

import functools
import math
from typing import get_args, get_type_hints

import pytest
import torch
from support import float64_draw, resolved, small_model

from selfalign import Objective, UserError, build_student
from selfalign.heads import ProjectionHead
from selfalign.terms.alignment import Alignment, distance, normalised

DISTANCES = get_args(get_type_hints(Alignment)["distance"])


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


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_is_its_definition(name, spread):
    a = torch.randn(2, 5, 3, dtype=torch.float64)
    b = a + spread * torch.randn(2, 5, 3, dtype=torch.float64)
    assert distance(name, a, b).item() == pytest.approx(by_hand(name, a, b), abs=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_is_zero_at_the_same_features_and_symmetric(name):
    a, b = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    assert distance(name, a, a).item() == pytest.approx(0, abs=1e-12)
    assert distance(name, a, b).item() == pytest.approx(distance(name, b, a).item())
    assert distance(name, a, b) > 0


@pytest.mark.parametrize("name", DISTANCES)
def test_does_not_depend_on_the_order_of_tokens(name):
    # The losses compare in group order and never sort back.
    a, b = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    order = torch.randperm(5)
    assert torch.allclose(distance(name, a[:, order], b[:, order]), distance(name, a, b))


def test_cosine_is_per_token_and_does_not_see_its_length():
    a, b = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    lengths = torch.rand(2, 5, 1, dtype=torch.float64) + 0.1
    assert torch.allclose(distance("cosine", a * lengths, b), distance("cosine", a, b))
    over_tokens = functools.partial(distance, "cosine-over-tokens")
    assert not torch.allclose(over_tokens(a * lengths, b), over_tokens(a, b))
    # the other one is per channel
    lengths = torch.rand(2, 1, 3, dtype=torch.float64) + 0.1
    assert torch.allclose(over_tokens(a * lengths, b), over_tokens(a, b))


def test_every_distance_is_reachable_from_the_config():
    assert set(DISTANCES) == {"cosine", "cosine-over-tokens", "smooth-l1", "l1", "l2"}
    for name in DISTANCES:
        for setting in ("alignment.distance", "terms.alignment.distance"):
            assert resolved("sra", {setting: name}).terms["alignment"].distance == name


def test_the_term_is_off_without_a_target():
    assert "alignment" not in resolved("sit").used_terms()
    assert list(resolved("sra").used_terms()) == ["denoising", "alignment"]


@pytest.mark.parametrize(("block", "tap"), [(3, 3), (0.5, 3), (1.0, 6), ("blocks.2.mlp",) * 2])
def test_the_head_hangs_on_the_chosen_block(block, tap):
    config = resolved("sra", {"terms.alignment.block": block})
    student = build_student(config)
    assert student.head_taps == {"ap_head": tap}
    assert isinstance(student.ap_head, ProjectionHead)


def test_is_the_distance_of_the_projected_features_and_the_target():
    changes = {"terms.alignment.block": 1, "targets.ema.block": 2, "terms.alignment.weight": 0.7}
    config = resolved("sra-dts-as", changes, channels=2, image_size=(4, 6))
    student, teacher = small_model(0, head_after=1), small_model(1)
    draw = float64_draw(config, (3, 2, 4, 6))
    x0, labels = torch.randn(3, 2, 4, 6, dtype=torch.float64), torch.tensor([0, 3, 4])
    objective = Objective(config)
    forward = objective.predict(student, teacher, x0, labels, draw)
    view = forward.views.student
    features = student.features(view.tokens, view.timesteps, forward.seen, view.groups, (1,))[1]
    projected = student.ap_head(features, None, view.groups)
    losses = objective.losses(forward)
    expected = distance("cosine", projected, forward.targets["ema"])
    assert torch.allclose(losses.terms["alignment"], expected)
    assert torch.allclose(losses.total, losses.terms["denoising"].mean() + 0.7 * expected)


@pytest.mark.parametrize("block", [0, 7, -1, 1.5, 0.0])
def test_blocks_that_are_not_there_are_refused(block):
    with pytest.raises(
        UserError, match=rf"terms\.alignment\.block is {block}: allowed are a block"
    ):
        resolved("sra", {"terms.alignment.block": block})


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("spatial_norm", ["none", "zscore"])
def test_features_in_half_precision_do_not_overflow(name: str, spatial_norm: str) -> None:
    """The squared norm of 1,152 features of 60 is 4·10⁶, and float16 ends at 65,504."""
    generator = torch.Generator().manual_seed(0)
    a, b = (60 * torch.randn(2, 40, 1152, generator=generator).half() for _ in range(2))
    found = distance(name, a, normalised(spatial_norm, b))
    expected = distance(name, a.double(), normalised(spatial_norm, b.double()))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-5)

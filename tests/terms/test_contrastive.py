"""Contrastive flow matching: which sample is pushed away from, and by how much."""

import pytest
import torch
from support import float64_draw, resolved, small_model

from selfalign import Objective, UserError, draw_views, make_generator
from selfalign.terms.contrastive import NEGATIVES

ON = {"objective.terms": ("contrastive",)}


@pytest.mark.parametrize("batch", [2, 5, 64])
def test_no_sample_is_its_own_negative_and_all_others_are(batch: int) -> None:
    config = resolved("sit", ON)
    seen = [set() for _ in range(batch)]
    for seed in range(40):
        draw = draw_views(config, (batch, 1, 8, 8), make_generator(seed, "test"))
        for index, negative in enumerate(draw.more[NEGATIVES].tolist()):
            seen[index].add(negative)
    assert all(
        index not in found and found <= set(range(batch)) for index, found in enumerate(seen)
    )
    if batch <= 5:
        assert all(len(found) == batch - 1 for found in seen)


@pytest.mark.parametrize("name", ["sit", "sra-dts-as"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_is_minus_the_error_against_the_others_velocity_in_image_order(
    name: str, path: str
) -> None:
    blocks = {"terms.alignment.block": 1, "targets.ema.block": 2}
    changes = {**ON, **(blocks if name != "sit" else {}), "flow.path": path}
    config = resolved(name, changes, channels=2, image_size=(4, 6))
    student, teacher = small_model(0, head_after=1), small_model(1)
    draw = float64_draw(config, (3, 2, 4, 6))
    x0, labels = torch.randn(3, 2, 4, 6, dtype=torch.float64), torch.tensor([0, 3, 4])
    objective = Objective(config)
    forward = objective.predict(student, teacher, x0, labels, draw)
    losses = objective.losses(forward)
    groups = forward.views.groups
    velocity, target = groups.restore(forward.output.velocity), groups.restore(forward.views.target)
    for index, negative in enumerate(draw.more[NEGATIVES].tolist()):
        expected = (velocity[index] - target[negative]).square().mean()
        assert torch.allclose(losses.terms["contrastive"][index], -expected)
    rest = losses.total - 0.05 * losses.terms["contrastive"].mean()
    assert torch.allclose(
        rest,
        Objective(resolved(name, changes | {"objective.terms": ()}, channels=2, image_size=(4, 6)))(
            student, teacher, x0, labels, draw
        ).total,
    )


@pytest.mark.parametrize("term", ["contrastive", "dispersive"])
def test_groups_that_are_dropped_are_refused(term: str) -> None:
    dropped = {"views.mask_ratios": (0.5, 0.5), "views.hidden_groups": 1}
    with pytest.raises(UserError, match=f"terms.{term} needs all tokens"):
        resolved("sit", {"objective.terms": (term,), **dropped})


def test_one_image_at_once_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.batch_size is 4: terms\.contrastive needs 2"):
        resolved("sit", {**ON, "training.batch_size": 4, "training.gradient_accumulation": 4})

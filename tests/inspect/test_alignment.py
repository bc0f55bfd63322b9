"""Alignment of student and teacher."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support import RECIPE_NAMES, randomize, resolved

from selfalign import UserError, build_student
from selfalign.data.source import MemorySplit
from selfalign.inspect.alignment import alignment, alike, logged
from selfalign.objective import Objective
from selfalign.parts import load_plugin
from selfalign.randomness import make_generator

SPLIT = MemorySplit(
    torch.randn(24, 1, 8, 8, generator=make_generator(0, "images")), torch.arange(24) % 5
)


def models(config):
    student, teacher = build_student(config), build_student(config)
    randomize(student, 0)
    randomize(teacher, 1)
    return student.eval().requires_grad_(False), teacher.eval().requires_grad_(False)


def test_the_same_features_are_alike_and_a_shared_mean_looks_so():
    x = torch.randn(50, 4, 8, generator=make_generator(0, "x"))
    found = alike(x, x)
    assert found.same.value == pytest.approx(1) and abs(found.other.value) < 0.1
    shifted = alike(x + 10, x + 10)
    assert shifted.other.value > 0.95, "which only the control tells"


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe(name):
    config = resolved(name, {"model.size": "tiny/2"})
    found = alignment(*models(config), config, SPLIT, (1, 6), images=24)
    assert set(found.by_block) == {1, 6}
    assert (found.loss is None) == (name == "sit")


@pytest.mark.usefixtures("forget_parts")
@pytest.mark.parametrize("name", ["repa", "irepa-dts-as", "layersync", "sra2-dts-as"])
def test_neighbours(name):
    """Encoders see the held-out images themselves, of which no features are stored."""
    load_plugin(str(Path(__file__).parent.parent / "small_encoder.py"))
    config = resolved(
        name,
        {
            "model.size": "tiny/2",
            "targets.frozen-encoder.encoders": ("small:1", "small:2"),
            "targets.frozen-encoder.widths": (6, 6),
            "targets.frozen-encoder.when": "once",
        },
    )
    seen = []
    found = alignment(
        *models(config), config, SPLIT, (1,), images=24, decode=lambda x: seen.append(len(x)) or x
    )
    assert found.loss is not None and found.loss != found.loss_other
    assert bool(seen) == ("repa" in name)


def test_without_what_it_is_compared_with():
    config = resolved("repa", {"model.size": "tiny/2", "targets.frozen-encoder.widths": (768,)})
    student = models(config)
    assert alignment(*student, config, SPLIT, (1,), images=24, with_loss=False).loss is None
    with pytest.raises(UserError, match="dinov2"):
        alignment(*student, config, SPLIT, (1,), images=24)


def test_one_network_seen_alike_is_alike():
    config = resolved("sit", {"model.size": "tiny/2"})
    student, _ = models(config)
    found = alignment(student, student, config, SPLIT, (3,), images=24)
    assert found.by_block[3].same.value == pytest.approx(1, abs=1e-6)
    assert found.by_block[3].other.value < 1


def test_the_loss_is_the_objectives():
    config = resolved("sra-dts-as", {"model.size": "tiny/2"})
    student, teacher = models(config)
    found = alignment(student, teacher, config, SPLIT, (1,), images=24)
    from selfalign.inspect.alignment import PARTS
    from selfalign.inspect.scenes import SEED, read_images
    from selfalign.views import draw_views

    x0, labels = read_images(SPLIT, 24, "alignment")
    values = []
    for number, part in enumerate(torch.arange(24).chunk(PARTS)):
        draw = draw_views(config, x0[part], make_generator(SEED, "alignment loss", number))
        losses = Objective(config)(student, teacher, x0[part], labels[part], draw)
        values.append(float(losses.terms["alignment"]))
    assert found.loss.value == pytest.approx(sum(values) / PARTS, abs=1e-6)


def test_what_was_logged_is_thinned_and_never_nan():
    lines = [{"step": s, "alignment_loss": 1 / s} for s in range(1, 201)]
    lines[3]["alignment_loss"] = float("nan")
    found = logged([*lines, {"step": 200, "heldout_ema": 0.5}], "alignment")
    assert len(found) == 40 and found[0][0] == pytest.approx((1 + 2 + 3 + 5 + 6) / 5)
    assert logged([], "alignment") == []
    assert dataclasses.asdict(found[0][1])["value"] > found[-1][1].value

"""What a batch contains, where it can be said beforehand."""

import math

import pytest
import torch
from support import RECIPE_NAMES, resolved

from selfalign.inspect.batch import (
    contents,
    coverage,
    distinct_views,
    draw_contents,
    visits_per_image,
)
from selfalign.randomness import make_generator

SIZES = {"model.size": "tiny/2", "training.batch_size": 64}
IMAGES = torch.randn(64, 1, 8, 8, generator=make_generator(0, "images"))


def config(name: str, **changes: object):
    return resolved(name, {**SIZES, **{k.replace("__", "."): v for k, v in changes.items()}})


def test_how_often_all_timesteps_are_high():
    """.1 with one timestep, .01 with two independent ones, between them with whole images."""
    (single,) = coverage(config("sra"), IMAGES).values()
    dual = coverage(config("sra-dts"), IMAGES)
    assert single.value == pytest.approx(0.1, abs=4 * single.standard_error)
    for share, found in dual.items():
        whole = round(share * 64) / 64
        known = 0.1 * whole + 0.01 * (1 - whole)
        error = math.sqrt(known * (1 - known) / 4096)
        assert found.value == pytest.approx(known, abs=4 * error)
    assert list(dual) == [0.0, 0.1, 0.25]


def test_a_batch_too_small_for_whole_images():
    assert list(coverage(config("sra-dts"), IMAGES[:4])) == [0.0, 0.25]


def test_hidden_groups_are_hidden_from_whole_images_too():
    hidden = config("sra-dts", views__mask_ratios=(0.75, 0.25), views__hidden_groups=1)
    assert list(coverage(hidden, IMAGES)) == [0.0]
    assert contents(hidden, IMAGES).visible.eq(12).all()
    assert distinct_views(hidden, IMAGES[0], visits=50)[-1][1] > 40


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe(name):
    found = contents(config(name), IMAGES)
    assert found.timesteps.shape == (4096, 16)
    assert sum(found.over_t()) == pytest.approx(1) and sum(found.over_gap()) == pytest.approx(1)
    assert sum(map(sum, found.states())) == pytest.approx(100)
    assert max(abs(share - 0.1) for share in found.over_t()) < 0.03, "every token has p(t)"
    assert (found.signal <= found.visible + 1e-4).all()


def test_context_of_a_token():
    full, separated = (contents(config(name), IMAGES) for name in ("sra-dts", "sra-dts-as"))
    assert (full.visible == 16).all()
    assert separated.visible.mean() == pytest.approx((4 * 4 + 12 * 12) / 16)
    mixed = draw_contents(config("sra-dts-as", views__whole_image_fraction=0.25), IMAGES)
    assert (mixed.visible[:16] == 16).all() and mixed.visible[16:].max() == 12
    assert (mixed.lowest[:16] == mixed.highest[:16]).all()


def test_signal_counts_clean_tokens():
    found = draw_contents(config("sra"), IMAGES)
    t = found.timesteps[:, 0]
    known = 16 * (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    assert torch.allclose(found.signal[:, 0], known)


def test_gaps():
    single = contents(config("sra-as"), IMAGES)
    assert single.over_gap()[0] == 1
    dual = contents(config("sra-dts"), IMAGES).over_gap()
    known = [(1 - k / 10) ** 2 - (1 - (k + 1) / 10) ** 2 for k in range(10)]
    assert max(abs(a - b) for a, b in zip(dual, known, strict=True)) < 0.03


def test_distinct_views():
    one = distinct_views(config("sra"), IMAGES[0], visits=200)
    assert one[-1] == (200, 1, 10), "one partition, ten tenths of t"
    two = distinct_views(config("sra-dts"), IMAGES[0], visits=200)
    assert 150 < two[-1][1] <= 200 and two[-1][1] <= two[-1][2]
    fixed = distinct_views(
        config("sra-as", views__partition="checkerboard", views__mask_ratios=(0.5, 0.5)),
        IMAGES[0],
        visits=100,
    )
    assert fixed[-1][1] <= 2
    assert [visits for visits, _, _ in two] == sorted({visits for visits, _, _ in two})


def test_visits():
    assert visits_per_image(config("sra", training__steps=800), 1397) == pytest.approx(36.65, 1e-3)

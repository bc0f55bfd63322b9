"""Interventions: exactly nothing on separated models, and what is known on others."""

from dataclasses import replace

import pytest
import torch
from known import Analytic, correlated, gaussian_posterior, gaussian_source
from support import resolved, small_model

from selfalign.inspect.interventions import (
    intervene,
    losses_by_share,
    partners,
    sample_apart,
)
from selfalign.inspect.scenes import make_scene
from selfalign.sampling.generate import generate
from selfalign.sampling.settings import SamplingConfig
from selfalign.tokens import TokenGroups
from selfalign.training.heldout import summarise

SIDE = 4
LEVELS = (0.2, 0.6, 0.9)


def _scene(recipe: str, images: int = 24):
    source = gaussian_source(correlated(SIDE, 2.0), images)
    config = resolved(recipe, channels=1, image_size=(SIDE, SIDE), num_classes=0)
    return config, source, make_scene(config, source.heldout, images, "interventions")


def _model(**settings):
    settings = {"dtype": torch.float32, "channels": 1, "image_size": (SIDE, SIDE), **settings}
    return small_model(**settings).eval()


def test_nothing_reaches_a_separated_group():
    _, _, scene = _scene("sra-dts-as")
    found = intervene(_model(), scene, LEVELS)
    for name, change in found.changes.items():
        assert not change.any(), f"{name} must be exactly 0"
    assert not torch.equal(found.full.errors, found.separated.errors)


def test_a_group_that_is_seen_matters():
    _, _, scene = _scene("sra-dts")
    changes = intervene(_model(), scene, LEVELS).changes
    same = torch.eye(len(LEVELS), dtype=torch.bool)
    assert not changes["timestep"][same].any(), "told the truth, exactly nothing changes"
    assert changes["timestep"][~same].any()
    assert changes["cut"].any() and changes["content"].any()


def test_ignorance_costs_what_the_posterior_knows():
    """The Bayes-optimal network loses by every intervention, and most where the other group is clean."""
    config, _, scene = _scene("sra-dts", images=300)
    model = Analytic(config.grid, 0, gaussian_posterior(correlated(SIDE, 2.0)))
    found = intervene(model, scene, LEVELS)
    for name in ("cut", "content"):
        change = found.changes[name]
        error = change.std(dim=2) / len(scene) ** 0.5
        assert (change.mean(dim=2) > -4 * error).all()
        assert (change.mean(dim=2)[1:, :2] > 4 * error[1:, :2]).all()
    assert torch.allclose(
        found.separated.errors, found.separated.errors[:, :1].expand_as(found.separated.errors)
    )


def test_partners_are_of_the_class():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    found = partners(labels)
    assert torch.equal(labels[found], labels) and found.tolist() == [2, 4, 5, 3, 1, 0]


def test_content_is_of_images_that_have_a_partner():
    """The only image of its class shows itself, which says nothing of content."""
    _, _, scene = _scene("sra-dts", images=6)
    labels = torch.tensor([0, 1, 0, 2, 3, 4])
    found = intervene(_model(), replace(scene, labels=labels), LEVELS).changes
    assert found["cut"].shape[2] == 6 and found["content"].shape[2] == 2
    assert (found["content"] != 0).all()
    alone = intervene(_model(), replace(scene, labels=torch.arange(6)), LEVELS)
    assert set(alone.changes) == {"cut", "timestep"}


def test_separation_costs_what_it_hides():
    config, source, _ = _scene("sra", images=200)
    model = Analytic(config.grid, 0, gaussian_posterior(correlated(SIDE, 2.0)))
    found = losses_by_share(model, source.heldout, "linear", shares=(0.25, 0.5), pairs=1000)
    losses = {share: summarise(errors).overall for share, errors in found.items()}
    assert losses[0.0] < losses[0.25] < losses[0.5]


class TestSamplesApart:
    def test_without_a_gap_they_are_eulers(self):
        model = _model(dtype=torch.float64)
        settings = SamplingConfig(solver="euler", steps=7)
        (samples,) = generate(model, "linear", settings, 3, batch_size=3, labels=[0, 1, 2])
        from selfalign.randomness import make_generator

        shape = (1, SIDE, SIDE)
        noise = [torch.randn(shape, generator=make_generator(0, "sample", i)) for i in range(3)]
        order = torch.stack([torch.randperm(SIDE**2) for _ in range(3)])
        groups = TokenGroups(order, (4, 12))
        found = sample_apart(model, torch.stack(noise), torch.arange(3), groups, 0.0, 7)
        assert torch.allclose(found.float(), samples.images, atol=1e-5)

    @pytest.mark.parametrize("gap", [0.2, 0.5])
    def test_both_groups_end_at_data(self, gap):
        """With v = -x0 + e of a known pair, every path ends at x0 whatever its timesteps."""
        config, _, _ = _scene("sra-dts")
        x0, noise = torch.randn(2, 1, SIDE, SIDE).double(), torch.randn(2, 1, SIDE, SIDE).double()
        order = torch.stack([torch.randperm(SIDE**2) for _ in range(2)])
        groups, seen = TokenGroups(order, (4, 12)), []

        def velocity(tokens, t, labels, of):
            seen.append(t)
            return of.sort(config.grid.patchify(noise - x0))

        found = sample_apart(
            Analytic(config.grid, 0, velocity), noise, torch.zeros(2).long(), groups, gap, 10
        )
        assert torch.allclose(found, x0)
        gaps = torch.stack([t[0, -1] - t[0, 0] for t in seen])
        assert gaps.max() == pytest.approx(gap) and gaps[0] == 0

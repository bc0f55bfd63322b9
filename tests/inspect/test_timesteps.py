"""The loss over both timesteps of Gaussian images, whose Bayes value is known, and of separated models."""

import dataclasses

import pytest
import torch
from known import (
    Analytic,
    correlated,
    gaussian_posterior,
    gaussian_source,
)
from support import resolved, small_model

from selfalign.flow import PATHS
from selfalign.inspect.scenes import make_scene, token_errors
from selfalign.inspect.timesteps import (
    gaussian_gain,
    gaussian_loss,
    loss_grid,
    within_class_covariance,
)

LEVELS = (0.0, 0.3, 0.7, 1.0)
SIDE = 3


def _gaussian(images: int, length: float = 2.0):
    covariance = correlated(SIDE, length)
    source = gaussian_source(covariance, images)
    config = resolved("sra-dts", channels=1, image_size=(SIDE, SIDE), num_classes=0)
    scene = make_scene(config, source.heldout, images, "gaussian")
    return covariance, source, config, scene


class TestGaussianPosterior:
    def test_the_loss_is_the_bayes_value(self):
        covariance, _, config, scene = _gaussian(images=600)
        model = Analytic(config.grid, 0, gaussian_posterior(covariance))
        grid = loss_grid(model, scene, LEVELS)
        order, first = scene.groups.order, scene.groups.sizes[0]
        for i, t in enumerate(LEVELS):
            for j, s in enumerate(LEVELS):
                known = torch.zeros(len(order), SIDE**2, dtype=torch.float64)
                for image in range(0, len(order), 20):
                    own = torch.zeros(SIDE**2).scatter(0, order[image, :first], 1.0)
                    for mine, pair in ((own, (t, s)), (1 - own, (s, t))):
                        loss = gaussian_loss(covariance[:, None, :, None], own, pair, scene.path)
                        known[image] += mine * loss
                known = known[::20].mean()
                found = grid.errors[i, j]
                error = found.std() / len(found) ** 0.5
                assert abs(found.mean() - known) < 4 * error + 0.01 * known

    def test_context_is_worth_what_the_formula_says(self):
        covariance, _, config, scene = _gaussian(images=600)
        model = Analytic(config.grid, 0, gaussian_posterior(covariance))
        found = loss_grid(model, scene, LEVELS).gain_by_image
        known = gaussian_gain(covariance[:, None, :, None], scene, LEVELS)
        for gain, value in zip(found, known, strict=True):
            assert abs(gain.mean() - value) < 4 * gain.std() / len(gain) ** 0.5 + 0.05 * value
        assert known[1] > 0.02, "there is something to gain"

    def test_independent_values_need_no_neighbours(self):
        """Of a diagonal covariance the loss is λ/(t² + (1-t)²·λ), whatever the others' timestep."""
        variance = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
        first = torch.tensor([1.0, 0.0, 0.0])
        for s in (0.0, 0.5, 1.0):
            loss = gaussian_loss(
                torch.diag(variance)[:, None, :, None], first, (0.4, s), PATHS["linear"]
            )
            assert float(loss[0]) == pytest.approx(0.3 / (0.16 + 0.36 * 0.3), rel=1e-6)

    def test_a_clean_copy_tells_all(self):
        copies = torch.ones(2, 1, 2, 1, dtype=torch.float64)
        first = torch.tensor([1.0, 0.0])
        own = gaussian_loss(copies, first, (0.5, 0.0), PATHS["linear"])
        alone = gaussian_loss(copies, first, (0.5, 1.0), PATHS["linear"])
        assert float(own[0]) == pytest.approx(0, abs=1e-8) and float(alone[0]) > 0.5

    def test_the_covariance_is_found(self):
        covariance, source, config, _ = _gaussian(images=4000)
        found = within_class_covariance(source, config.grid)
        assert (found.reshape(9, 9) - covariance).abs().max() < 0.1

    def test_it_is_left_out_where_images_are_large(self, monkeypatch):
        monkeypatch.setattr("selfalign.inspect.timesteps.GAUSSIAN_VALUES", 8)
        _, source, config, _ = _gaussian(images=10)
        assert within_class_covariance(source, config.grid) is None

    def test_it_is_left_out_where_images_are_few(self):
        """Nine values take nine images beyond one of each class."""
        _, source, config, _ = _gaussian(images=9)
        assert within_class_covariance(source, config.grid) is None
        _, source, config, _ = _gaussian(images=10)
        assert within_class_covariance(source, config.grid) is not None


class TestSeparated:
    def test_the_loss_is_constant_in_the_others_timestep_bit_for_bit(self):
        _, _, _, scene = _gaussian(images=20)
        model = small_model(dtype=torch.float32, channels=1, image_size=(SIDE, SIDE)).eval()
        grid = loss_grid(model, scene.separated(True)).errors
        assert grid.shape == (10, 10, 20)
        assert torch.equal(grid, grid[:, :1].expand_as(grid))
        full = loss_grid(model, scene.separated(False), LEVELS).errors
        assert not torch.equal(full, full[:, :1].expand_as(full))

    def test_gap_changes_nothing(self):
        _, _, _, scene = _gaussian(images=10)
        model = small_model(dtype=torch.float32, channels=1, image_size=(SIDE, SIDE)).eval()
        gaps = loss_grid(model, scene.separated(True), LEVELS).by_gap()
        assert [gap for gap, _ in gaps] == pytest.approx([0.3, 0.7, 1.0])
        assert all(value.value == 0 and value.standard_error == 0 for _, value in gaps)


class TestScenes:
    def test_a_purpose_is_a_draw(self):
        _, source, config, scene = _gaussian(images=50)
        again = make_scene(config, source.heldout, 50, "gaussian")
        other = make_scene(config, source.heldout, 50, "other")
        assert torch.equal(scene.noise, again.noise) and not torch.equal(scene.noise, other.noise)
        assert scene.groups.sizes == (2, 7) and not scene.groups.separate

    def test_recipes_of_one_group_are_shown_two(self):
        source = gaussian_source(correlated(SIDE, 2.0), 5)
        config = resolved("sra", channels=1, image_size=(SIDE, SIDE), num_classes=0)
        assert make_scene(config, source.heldout, 5, "a").groups.sizes == (2, 7)
        config = resolved("sra-as", channels=1, image_size=(SIDE, SIDE), num_classes=0)
        assert make_scene(config, source.heldout, 5, "a").groups.separate

    def test_more_groups_than_two_count_as_two(self):
        source = gaussian_source(correlated(SIDE, 2.0), 5)
        changes = {"views.mask_ratios": (0.5, 0.25, 0.25)}
        config = resolved("sra-dts", changes, channels=1, image_size=(SIDE, SIDE), num_classes=0)
        scene = make_scene(config, source.heldout, 5, "a")
        assert sum(scene.groups.sizes) == 9 and len(scene.groups.sizes) == 2

    def test_batches_change_nothing(self, monkeypatch):
        _, _, _, scene = _gaussian(images=11)
        model = small_model(channels=1, image_size=(SIDE, SIDE)).eval()
        whole = token_errors(model, scene, (0.2, 0.8))
        monkeypatch.setattr("selfalign.inspect.scenes.BATCH_TOKENS", 4 * SIDE**2)
        assert torch.allclose(token_errors(model, scene, (0.2, 0.8)), whole, rtol=1e-12)

    def test_whole_groups_at_one_timestep_are_the_heldout_loss(self):
        """Two groups at one t, seeing each other, are the whole image."""
        _, _, _, scene = _gaussian(images=7)
        model = small_model(channels=1, image_size=(SIDE, SIDE)).eval()
        errors = scene.groups.restore(token_errors(model, scene, (0.4, 0.4))[..., None])
        groups = dataclasses.replace(scene.groups, order=None)
        plain = dataclasses.replace(
            scene,
            clean=scene.groups.restore(scene.clean),
            noise=scene.groups.restore(scene.noise),
            groups=groups,
        )
        assert torch.allclose(token_errors(model, plain, (0.4, 0.4)), errors[..., 0], rtol=1e-9)

"""The formulas of docs/theory.md against simulation, closed forms and exact enumeration."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import theory
import theory_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from support import clean_images, draw_of, randomize, resolved
from theory_runs import best_velocity, excess

from selfalign import Objective, build_student
from selfalign.tokens import TokenGrid
from selfalign.views import Draw


def covariance(dimensions: int, seed: int, scale: float = 1.0) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(dimensions, dimensions))
    return scale * root @ root.T / dimensions


class TestLoss:
    @pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
    def test_is_that_of_the_best_velocity(self, t):
        """No linear predictor is better, and it is as good."""
        sigma = covariance(3, 0)
        generator = np.random.default_rng(1)
        x0 = generator.multivariate_normal(np.zeros(3), sigma, size=200_000)
        noise = generator.normal(size=x0.shape)
        xt, velocity = (1 - t) * x0 + t * noise, noise - x0
        fitted, *_ = np.linalg.lstsq(xt, velocity, rcond=None)
        least = ((velocity - xt @ fitted) ** 2).sum(axis=1).mean()
        assert theory.velocity_loss(theory.axes(sigma), t).sum() == pytest.approx(least, rel=0.01)
        given_ = torch.tensor(sigma).expand(len(xt), -1, -1)[:2000]
        best = best_velocity(given_, torch.tensor(xt[:2000]), torch.full((2000,), t).double())
        assert best.numpy() == pytest.approx(xt[:2000] @ fitted, abs=0.05)

    @pytest.mark.parametrize("variance", [1e-3, 0.3, 1.0, 20.0])
    def test_averages_to_half_pi_times_the_deviation(self, variance):
        mean, _ = integrate.quad(lambda t: theory.velocity_loss(np.array(variance), t), 0, 1)
        assert theory.mean_loss(np.array(variance)) == pytest.approx(mean, rel=1e-6)


class TestSeparation:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10_000), t=st.one_of(st.none(), st.floats(0.02, 0.98)))
    def test_never_helps(self, seed, t):
        _, cost = theory.separation_cost(covariance(12, seed), 6, (1 / 3, 2 / 3), t, subsets=5)
        assert cost >= -1e-12

    def test_costs_nothing_where_tokens_are_independent(self):
        sigma = np.kron(np.eye(8), covariance(2, 0))
        assert theory.separation_cost(sigma, 8)[1] == pytest.approx(0, abs=1e-12)

    def test_two_tokens(self):
        """Eigenvalues 1 ± c against 1 and 1."""
        sigma = np.array([[1, 0.6], [0.6, 1]])
        whole, cost = theory.separation_cost(sigma, 2, (0.5, 0.5))
        assert whole == pytest.approx(math.pi / 4 * (math.sqrt(1.6) + math.sqrt(0.4)))
        assert whole + cost == pytest.approx(math.pi / 2)

    def test_where_noise_dominates(self):
        sigma = covariance(24, 3, scale=1e-4)
        for shares in ((0.25, 0.75), (0.5, 0.5), (0.25, 0.25, 0.5)):
            _, cost = theory.separation_cost(sigma, 12, shares, t=0.9, subsets=3000)
            expected = theory.small_signal_cost(sigma, 12, shares, t=0.9)
            assert cost == pytest.approx(expected, rel=0.03)

    def test_of_the_packages_partitions(self):
        """Rows of a picture whose rows know nothing of each other hide nothing; random groups do."""
        sigma = np.kron(np.eye(4), covariance(16, 0))  # a row: four tokens of 2×2 pixels
        found = {
            name: theory.separation_cost(
                sigma, 16, drawn=theory.partitioned(name, 2, (0.25, 0.75), 50)
            )[1]
            for name in ("stripes", "random", "checkerboard")
        }
        assert found["stripes"] == pytest.approx(0, abs=1e-12)
        assert found["random"] > 1e-3 and found["checkerboard"] > 1e-3

    def test_rises_with_finer_patches_of_the_same_pixels(self):
        sigma = theory.stationary_covariance(8, 2.0)
        costs = [
            theory.separation_cost(theory.by_token(sigma, 8, p), (8 // p) ** 2)[1]
            for p in (4, 2, 1)
        ]
        assert costs == sorted(costs) and costs[2] > 1.3 * costs[0]

    @pytest.mark.parametrize("patch", [1, 2, 4])
    def test_tokens_are_those_of_the_models(self, patch):
        pixels = torch.arange(64.0).view(1, 1, 8, 8)
        tokens = TokenGrid((8, 8), patch).patchify(pixels).flatten().double()
        sigma = np.outer(np.arange(64), np.arange(64)).astype(float)
        assert theory.by_token(sigma, 8, patch) == pytest.approx(
            torch.outer(tokens, tokens).numpy()
        )

    def test_a_models_excess_is_its_distance_from_the_best(self):
        """A model that predicts 0 misses all of the best velocity."""
        sigma = torch.tensor(theory.by_token(theory.stationary_covariance(8, 2.0), 8, 2))
        config = resolved("sit", {"model.size": "tiny/2"}, channels=1, image_size=(8, 8))
        found = excess(build_student(config), sigma[None], 0, separate=False)
        least, _ = theory.separation_cost(sigma.numpy(), 16)
        assert found == pytest.approx(1 + sigma.diagonal().mean().item() - least, rel=0.05)


class TestGradientVariance:
    def test_against_simulation(self):
        generator = np.random.default_rng(0)
        shares, rho, rest = np.array([0.25, 0.75]), 0.5, 0.2

        def variance(correlation: float) -> float:
            mixed = np.full((2, 2), correlation) + (1 - correlation) * np.eye(2)
            return float(
                (generator.multivariate_normal(np.zeros(2), mixed, 200_000) @ shares).var()
            )

        found = variance(rest) / variance(rho)
        assert theory.variance_ratio((0.25, 0.75), rho, rest) == pytest.approx(found, rel=0.02)

    def test_the_tempting_statement_is_the_case_of_equal_gradients(self):
        assert theory.variance_ratio((0.25, 0.75), 1) == pytest.approx(0.625)
        assert theory.variance_ratio((0.25, 0.75), 0.2) == pytest.approx(0.625 / 0.7)
        assert theory.variance_ratio((0.25, 0.75), 0) == 1


def test_a_loss_is_the_sum_of_its_groups() -> None:
    config = resolved("sra-dts-as")
    student, teacher = build_student(config), build_student(config)
    randomize(student, 0, std=0.1)
    randomize(teacher, 1, std=0.1)
    labels = torch.zeros(8, dtype=torch.int64)
    objective = Objective(config)
    forward = objective.predict(student, teacher, clean_images(config), labels, draw_of(config))
    parts = theory_runs._by_group(objective, forward)
    assert len(parts) == 2
    assert sum(parts).item() == pytest.approx(objective.losses(forward).total.item(), rel=1e-5)


def test_gradients_at_a_runs_weights(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory_runs, "BATCHES", 6)
    monkeypatch.setattr(theory_runs, "BLOCKS", 3)
    found = theory_runs.gradients(small_run)
    assert set(found) == {"separated", "full"}
    for values in found.values():
        for value, error in values.values():
            assert math.isfinite(value) and error >= 0
        assert 0.2 < values["variance_ratio"][0] < 5
        assert abs(values["correlation_shared"][0]) <= 1


@pytest.mark.parametrize("attention", ["separated", "full"])
def test_mean_gradients_are_equal_under_separation_alone(attention):
    """Every combination of three timesteps, in double precision, at weights that are no optimum."""
    values = (0.2, 0.5, 0.9)
    gradients = {}
    for schedule in ("single", "independent"):
        config = resolved("sra-dts-as", {"views.timesteps": schedule, "views.attention": attention})
        student, teacher = build_student(config).double(), build_student(config).double()
        randomize(student, 0, std=0.1)
        randomize(teacher, 1, std=0.1)
        images = clean_images(config, batch=2).double()
        shape = images.shape
        groups = config.num_groups
        pairs = (
            list(itertools.product(values, repeat=groups))
            if schedule == "independent"
            else [(t,) * groups for t in values]
        )
        parameters = [p for p in student.parameters() if p.requires_grad]
        total = 0.0
        for pair in pairs:
            generator = torch.Generator().manual_seed(0)
            draw = Draw(
                noise=torch.randn(shape, generator=generator).double(),
                timesteps=torch.tensor(pair).double().expand(2, -1),
                order=torch.rand(2, config.grid.num_tokens, generator=generator).argsort(dim=1),
                teacher_interval=torch.full((2, groups), 0.1).double(),
                label_dropout=torch.zeros(2, dtype=torch.bool),
            )
            loss = Objective(config)(student, teacher, images, torch.tensor([0, 1]), draw).total
            found = torch.autograd.grad(loss, parameters)
            total = total + torch.cat([g.flatten() for g in found]) / len(pairs)
        gradients[schedule] = total
    moved = (gradients["single"] - gradients["independent"]).norm() / gradients["single"].norm()
    if attention == "separated":
        assert moved < 1e-10
    else:
        assert moved > 1e-3

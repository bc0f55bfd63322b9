"""The paths against their definitions: end points, derivatives, and the score of a Gaussian."""

import pytest
import torch

from selfalign.flow import PATHS

TIMES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.fixture(params=sorted(PATHS))
def path(request):
    return PATHS[request.param]


def test_the_field_has_both_paths():
    assert set(PATHS) == {"linear", "cosine"}


def test_starts_at_the_data_and_ends_at_pure_noise(path):
    x0, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert torch.allclose(path.interpolate(x0, noise, zero), x0)
    assert torch.allclose(path.interpolate(x0, noise, one), noise)


def test_velocity_is_the_time_derivative_of_the_path(path):
    x0, noise = torch.randn(2, 99, dtype=torch.float64)
    times = TIMES.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(path.interpolate(x0, noise, times).sum(), times)
    assert torch.allclose(path.velocity(x0, noise, TIMES), derivative, atol=1e-12)
    # and once more without autograd
    step = 1e-6
    ahead, behind = (path.interpolate(x0, noise, TIMES + s) for s in (step, -step))
    assert torch.allclose(derivative, (ahead - behind) / (2 * step), atol=1e-8)


def test_linear_velocity_is_noise_minus_data():
    x0, noise = torch.randn(2, 4, 7)
    t = torch.rand(4, 1)
    assert torch.equal(PATHS["linear"].velocity(x0, noise, t), noise - x0)


def test_cosine_path_keeps_the_variance_of_unit_data():
    path = PATHS["cosine"]
    assert torch.allclose(path.alpha(TIMES) ** 2 + path.sigma(TIMES) ** 2, torch.ones_like(TIMES))


def test_noise_only_grows(path):
    assert (path.sigma_derivative(TIMES) > 0).all()
    assert (path.alpha_derivative(TIMES) < 0).all()


def test_score_of_a_gaussian(path):
    # x0 ~ N(mean, std²) gives x_t ~ N(α·mean, α²std² + σ²); its mean velocity is the conditional
    # expectation of α'x0 + σ'ε, a linear regression on x_t.
    mean, std, t = 0.7, 0.4, TIMES
    xt = torch.linspace(-3, 3, 99, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = alpha**2 * std**2 + sigma**2
    covariance = path.alpha_derivative(t) * alpha * std**2 + path.sigma_derivative(t) * sigma
    centred = xt - alpha * mean
    velocity = path.alpha_derivative(t) * mean + covariance / variance * centred
    score = path.score(velocity, xt, t)
    assert torch.allclose(score, -centred / variance, atol=1e-9)


def test_score_of_one_image_points_back_along_its_noise(path):
    x0, noise = torch.randn(2, 99, dtype=torch.float64)
    xt, velocity = path.interpolate(x0, noise, TIMES), path.velocity(x0, noise, TIMES)
    expected = -noise / path.sigma(TIMES)
    assert torch.allclose(path.score(velocity, xt, TIMES), expected, rtol=1e-6)


def test_score_of_pure_noise_is_minus_the_state(path):
    xt = torch.randn(10, dtype=torch.float64)
    score = path.score(torch.randn(10, dtype=torch.float64), xt, torch.ones(10).double())
    assert torch.allclose(score, -xt, atol=1e-12)


def test_timesteps_broadcast_per_token(path):
    x0, noise = torch.randn(2, 2, 6, 3)
    t = torch.rand(2, 6, 1)
    mixed = path.interpolate(x0, noise, t)
    for b in range(2):
        for n in range(6):
            one = path.interpolate(x0[b, n], noise[b, n], t[b, n])
            assert torch.allclose(mixed[b, n], one)

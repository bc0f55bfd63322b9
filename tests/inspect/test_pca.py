"""Principal components of features whose subspace was planted."""

import torch

from selfalign.inspect.pca import colours, components
from selfalign.randomness import make_generator

T, M, N, D = 4, 30, 6, 10


def _planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three directions of falling variance (timestep, class, chance), beneath large position means."""
    generator = make_generator(0, "planted")
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q[:, :3].T
    labels = torch.arange(M) % 3
    scores = torch.zeros(T, M, N, 3, dtype=torch.float64)
    scores[..., 0] = 9 * (torch.arange(T) - (T - 1) / 2)[:, None, None]
    scores[..., 1] = 4 * (labels - 1)[None, :, None]
    chance = torch.randn(T, M, N, generator=generator, dtype=torch.float64)
    scores[..., 2] = chance - chance.mean(dim=(0, 1))
    means = 20 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return scores @ basis + means, labels, basis


def test_a_planted_subspace_is_found():
    features, labels, basis = _planted()
    found = components(features, labels)
    projection = found.directions.T @ found.directions
    assert (projection - basis.T @ basis).abs().max() < 1e-6
    assert found.variance.sum() > 1 - 1e-9 and (found.variance.diff() < 0).all()


def test_what_each_component_follows():
    features, labels, _ = _planted()
    of = components(features, labels).r_squared
    assert of["t"][0] > 0.99 and of["class"][0] < 0.01
    assert of["class"][1] > 0.97 and of["t"][1] < 0.01 and of["shuffled"][1] < 0.2
    assert of["t"][2] < 0.05 and of["class"][2] < 0.05


def test_the_position_is_told_before_it_is_removed():
    generator = make_generator(0, "position")
    means = torch.randn(N, D, generator=generator)
    noise = 0.1 * torch.randn(T, M, N, D, generator=generator)
    found = components(means + noise, torch.arange(M) % 3)
    assert (found.r_squared["position"] > 0.5).all(), "along any direction"
    within = found.scores.mean(dim=(0, 1))
    assert within.abs().max() < 1e-12


def test_signs_are_fixed():
    features, labels, _ = _planted()
    one, two = components(features, labels), components(-features, labels)
    assert torch.allclose(one.directions, two.directions)


def test_colours_fill_their_range():
    picture = colours(torch.tensor([[0.0, 5.0], [1.0, 6.0], [2.0, 7.0], [4.0, 9.0]]), (2, 2))
    assert picture.shape == (2, 2, 3) and picture[..., 0].tolist() == [[0, 64], [128, 255]]
    assert not picture[..., 2].any()

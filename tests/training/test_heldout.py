"""The held-out loss: common random numbers, even coverage, a known answer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from selfalign import build_student, recipe, resolve
from selfalign.data.datasets import open_data
from selfalign.randomness import make_generator
from selfalign.runs.load import load_run
from selfalign.sections import DataConfig
from selfalign.training.heldout import heldout_loss


def test_does_not_depend_on_the_batch_size(small_run: Path) -> None:
    model, split = load_run(small_run).model, open_data(DataConfig()).heldout
    a = heldout_loss(model, split, "linear", 60, batch_size=60)
    b = heldout_loss(model, split, "linear", 60, batch_size=7)
    assert a.overall == pytest.approx(b.overall, rel=1e-5)
    assert a.by_timestep == pytest.approx(b.by_timestep, rel=1e-5)
    assert a.overall == pytest.approx(sum(a.by_timestep) / 10)


def test_an_untrained_model_has_the_loss_of_predicting_zero() -> None:
    source = open_data(DataConfig())
    config = resolve(recipe("sit", {"model.size": "tiny/2"}), 1, (8, 8), 10)
    loss = heldout_loss(build_student(config), source.heldout, "linear", 4000)
    images, _ = source.heldout.read(range(400))
    # E|noise - x0|² = 1 + E x0², at every t.
    expected = 1 + images.square().mean().item()
    assert loss.overall == pytest.approx(expected, rel=0.01)
    assert loss.by_timestep == pytest.approx([expected] * 10, rel=0.03)


def test_every_image_meets_every_bin() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def __len__(self) -> int:
            return 10

        def read(self, indices: list[int], seeds: None = None) -> tuple[Tensor, Tensor]:
            self.seen += indices
            return torch.zeros(len(indices), 1, 8, 8), torch.zeros(len(indices), dtype=torch.int64)

    config = resolve(recipe("sit", {"model.size": "tiny/2"}), 1, (8, 8), 10)
    split = Recorder()
    heldout_loss(build_student(config), split, "linear", 100)  # type: ignore[arg-type]
    assert sorted(split.seen) == sorted(list(range(10)) * 10)
    assert len({(image, i % 10) for i, image in enumerate(split.seen)}) == 100


class Noise:
    """Images of which each has its own scale: some are harder than others, at every t."""

    def __init__(self, seed: int, size: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(size, 1, 8, 8, generator=generator)
        self.images = images * torch.rand(size, 1, 1, 1, generator=generator) * 3

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: list[int], seeds: None = None) -> tuple[Tensor, Tensor]:
        return self.images[indices], torch.zeros(len(indices), dtype=torch.int64)


@pytest.mark.parametrize("size", [20, 400])  # ten pairs of each image, and one
def test_standard_error_is_the_spread_over_sets_of_images(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(recipe("sit", {"model.size": "tiny/4"}), 1, (8, 8), 10)
    model = build_student(config)
    losses = []
    for seed in range(60):
        monkeypatch.setattr("selfalign.training.heldout._SEED", seed)
        losses.append(heldout_loss(model, Noise(seed, size), "linear", 200))
    true = torch.tensor([loss.overall for loss in losses]).std().item()
    squares = torch.tensor([loss.standard_error**2 for loss in losses])
    assert squares.mean().sqrt().item() == pytest.approx(true, rel=0.25)
    by_bin = torch.tensor([loss.by_timestep for loss in losses]).std(dim=0)
    claimed = torch.tensor([loss.by_timestep_standard_errors for loss in losses])
    typical = claimed.square().mean(dim=0).sqrt()
    assert (typical / by_bin).mean().item() == pytest.approx(1, rel=0.25)


def test_standard_error_combines_the_variances_within_bins() -> None:
    """By hand, where every pair has an image of its own: an untrained model says 0 everywhere."""
    source = Noise(0, 100)
    config = resolve(recipe("sit", {"model.size": "tiny/4"}), 1, (8, 8), 10)
    loss = heldout_loss(build_student(config), source, "linear", 40)
    variances = []
    for k in range(10):
        errors = []
        for i in range(k, 40, 10):
            generator = make_generator(0, "heldout", i)
            torch.rand(1, generator=generator)
            noise = torch.randn(1, 8, 8, generator=generator)
            errors.append((noise - source.images[i + i // 10]).square().mean())
        variances.append(torch.stack(errors).double().var().item() / 4)
    assert loss.standard_error == pytest.approx(sum(variances) ** 0.5 / 10, rel=1e-5)
    expected = [variance**0.5 for variance in variances]
    assert loss.by_timestep_standard_errors == pytest.approx(expected, rel=1e-5)


def test_one_image_is_enough() -> None:
    source = open_data(DataConfig())

    class One:
        def __len__(self) -> int:
            return 1

        def read(self, indices: list[int], seeds: None = None) -> tuple[Tensor, Tensor]:
            return source.heldout.read(indices)

    config = resolve(recipe("sit", {"model.size": "tiny/2"}), 1, (8, 8), 10)
    loss = heldout_loss(build_student(config), One(), "linear", 20)
    assert all(value > 0 for value in loss.by_timestep)
    assert loss.standard_error == pytest.approx(0, abs=1e-9)

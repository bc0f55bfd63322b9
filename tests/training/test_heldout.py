"""The held-out loss: common random numbers, even coverage, a known answer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from selfalign import recipe, resolve
from selfalign.config import DataConfig
from selfalign.data import open_data
from selfalign.models.sit import SiT
from selfalign.run import load_run
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
    loss = heldout_loss(SiT.from_config(config), source.heldout, "linear", 4000)
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
    heldout_loss(SiT.from_config(config), split, "linear", 100)  # type: ignore[arg-type]
    assert sorted(split.seen) == sorted(list(range(10)) * 10)
    assert len({(image, i % 10) for i, image in enumerate(split.seen)}) == 100


def test_one_image_is_enough() -> None:
    source = open_data(DataConfig())

    class One:
        def __len__(self) -> int:
            return 1

        def read(self, indices: list[int], seeds: None = None) -> tuple[Tensor, Tensor]:
            return source.heldout.read(indices)

    config = resolve(recipe("sit", {"model.size": "tiny/2"}), 1, (8, 8), 10)
    loss = heldout_loss(SiT.from_config(config), One(), "linear", 20)
    assert all(value > 0 for value in loss.by_timestep)

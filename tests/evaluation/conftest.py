"""A cache of their own for the tests of evaluation, and a run that was never trained."""

from pathlib import Path

import pytest
import torch

from selfalign import build_student, make_generator, recipe, resolve
from selfalign.cli import main
from selfalign.data.datasets import open_data
from selfalign.evaluation import generation
from selfalign.runs.folder import write_config
from selfalign.training.checkpoint import CheckpointState, save_checkpoint


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, so that the classifier is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFALIGN_CACHE", str(cache))
    monkeypatch.setenv("TORCH_HOME", str(cache / "torch"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run on digits with one checkpoint; its EMA and raw weights differ."""
    folder = tmp_path / "run"
    config = recipe("sit", {"model.size": "tiny/4", "training.steps": 1})
    source = open_data(config.data)
    config = resolve(config, source.channels, source.image_size, source.num_classes)
    write_config(folder, config, source)
    models = []
    for name in ("raw", "ema"):
        model = build_student(config)
        with torch.no_grad():
            weight = model.final_layer.linear.weight  # zero otherwise, and all samples noise
            weight.normal_(std=0.1, generator=make_generator(0, name))
        models.append(model)
    optimizer = torch.optim.AdamW(models[0].parameters())
    save_checkpoint(folder / "checkpoints", *models, optimizer, CheckpointState(1), keep=1)
    return folder


@pytest.fixture
def evaluated(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], Path]:
    """A command that evaluates the run in three shards and was run once, and where its samples are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "SHARD", 16)
    words = ["evaluate", "run", "--num", "40", "--steps", "1", "--metrics", "fd"]
    assert main(words) == 0
    (kept,) = (run_folder / "evaluation").iterdir()
    return words, kept

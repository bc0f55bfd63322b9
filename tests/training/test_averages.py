"""Several averages in one run: each as if it were alone, kept, resumed, sampled from and swept."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from support import assert_same_run

from selfalign import UserError, override, recipe
from selfalign.cli import main
from selfalign.cli.evaluate import _sweep
from selfalign.runs.load import load_run
from selfalign.runs.start import resume_run, start_run
from selfalign.sections import TrainingConfig
from selfalign.training.checkpoint import checkpoints, latest_checkpoint, weights_file

DECAYS = (0.5, 0.9, 0.99)


def quiet(state, values) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averages") / "run"
    config = {**SMALL, "training.ema_decay": DECAYS, "training.ema_warmup": False}
    start_run(recipe("sra", config), folder, quiet, monitors=())
    return folder


def test_each_is_what_it_would_be_alone(run: Path, tmp_path: Path) -> None:
    # Without a teacher the average has no effect on the student.
    settings = {**SMALL, "training.ema_warmup": False}
    start_run(
        recipe("sit", {**settings, "training.ema_decay": DECAYS}),
        tmp_path / "all",
        quiet,
        monitors=(),
    )
    for decay in DECAYS:
        alone = tmp_path / str(decay)
        start_run(
            recipe("sit", {**settings, "training.ema_decay": decay}), alone, quiet, monitors=()
        )
        file = latest_checkpoint(tmp_path / "all" / "checkpoints") / weights_file(
            f"ema:{decay}", DECAYS
        )
        expected = load_file(latest_checkpoint(alone / "checkpoints") / "ema.safetensors")
        found = load_file(file)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_resuming_is_exact(tmp_path: Path) -> None:
    config = recipe("sra", {**SMALL, "training.ema_decay": DECAYS})
    start_run(config, tmp_path / "whole", quiet, monitors=())
    start_run(override(config, {"training.steps": 4}), tmp_path / "halves", quiet, monitors=())
    resume_run(tmp_path / "halves", 6, quiet, monitors=())
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    for file in ("ema-0.9.safetensors", "ema-0.99.safetensors"):
        a, b = (
            load_file(latest_checkpoint(tmp_path / n / "checkpoints") / file)
            for n in ("whole", "halves")
        )
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_missing_average_is_told_before_the_run_goes_on(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (checkpoint,) = checkpoints(copy / "checkpoints")[-1:]
    (checkpoint / "ema-0.9.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks ema-0\.9\.safetensors"):
        resume_run(copy, 8, quiet)


def test_one_is_chosen_by_its_decay(run: Path) -> None:
    first, named, other, raw = (
        load_run(run, weights).model.state_dict()["final_layer.linear.weight"]
        for weights in ("ema", "ema:0.50", "ema:0.99", "raw")
    )
    assert torch.equal(first, named)
    assert not torch.equal(first, other) and not torch.equal(first, raw)
    for wrong in ("ema:0.7", "average", "ema:", "ema:x"):
        with pytest.raises(
            UserError, match=r"this run keeps raw, ema, ema:0\.5, ema:0\.9, ema:0\.99"
        ):
            load_run(run, wrong)


def test_a_sweep_is_the_command_for_each() -> None:
    words = ["runs/x", "--weights", "ema:0.5", "ema:0.9", "raw", "--num", "20"]
    assert [found[2] for found in _sweep(words)] == ["ema:0.5", "ema:0.9", "raw"]
    assert all(
        found[:2] + found[3:] == ["runs/x", "--weights", "--num", "20"] for found in _sweep(words)
    )
    assert _sweep(["a", "--weights", "ema"]) == [["a", "--weights", "ema"]]
    assert _sweep(["a"]) == [["a"]]
    with pytest.raises(UserError, match="--out takes one evaluation"):
        _sweep([*words, "--out", "x"])


@pytest.mark.slow
def test_every_average_is_evaluated(run: Path) -> None:
    small = ["--num", "20", "--steps", "1", "--metrics", "denoising"]
    assert main(["evaluate", str(run), "--weights", "ema:0.9", "ema:0.99", *small]) == 0
    assert len(list((run / "evaluation").glob("*/evaluation.json"))) == 2
    assert main(["evaluate", str(run), "--weights", "ema:0.7", *small]) == 2


def test_settings() -> None:
    assert TrainingConfig(ema_decay=0.9).ema_decays == (0.9,)
    assert TrainingConfig(ema_decay=(0.9, 0.5)).ema_decays == (0.9, 0.5)
    for wrong, said in (((), "or several"), ((0.5, 0.5), "twice"), ((0.5, 2.0), "from 0 to 1")):
        with pytest.raises(UserError, match=said):
            TrainingConfig(ema_decay=wrong)

"""Checkpoints are whole or absent."""

import json
from pathlib import Path

import pytest
import torch

from selfalign import SiT, UserError
from selfalign.run import load_run, resume_run
from selfalign.training import checkpoint
from selfalign.training.checkpoint import (
    latest_checkpoint,
    load_optimizer,
    load_weights,
    save_checkpoint,
)


@pytest.fixture
def parts() -> tuple[SiT, SiT, torch.optim.AdamW]:
    """A student, an average, and an optimizer that has made a step."""
    settings = {"channels": 1, "image_size": (4, 4), "patch_size": 2, "num_classes": 3}
    student, ema = (
        SiT(hidden_size=24, depth=1, heads=2, **settings)
        for _ in range(2)  # type: ignore[arg-type]
    )
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return student, ema, optimizer


def test_keeps_the_last_ones_and_points_to_the_latest(tmp_path: Path, parts: tuple) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, *parts, {}, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000003", "step_00000004"]
    assert latest_checkpoint(tmp_path).name == "step_00000004"
    assert list(tmp_path.glob(".*")) == []


def test_everything_comes_back(tmp_path: Path, parts: tuple) -> None:
    student, ema, optimizer = parts
    saved = save_checkpoint(tmp_path, 7, student, ema, optimizer, {"scaler": None}, keep=1)
    settings = {"channels": 1, "image_size": (4, 4), "patch_size": 2, "num_classes": 3}
    other = SiT(hidden_size=24, depth=1, heads=2, **settings)  # type: ignore[arg-type]
    load_weights(saved, other, "ema.safetensors")
    for a, b in zip(other.state_dict().values(), ema.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    fresh = torch.optim.AdamW(student.parameters(), fused=True)
    load_optimizer(saved, student, fresh)
    before, after = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys()
    for index in before:
        for key in before[index]:
            assert torch.equal(before[index][key], after[index][key])


@pytest.mark.parametrize("failing", ["model", "ema", "optimizer"])
def test_a_failed_write_leaves_the_last_checkpoint_alone(
    tmp_path: Path, parts: tuple, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, *parts, {}, keep=1)
    real = checkpoint.save_file

    def full_disk(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.stem == failing:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError, match="cannot be written: .*No space left"):
        save_checkpoint(tmp_path, 2, *parts, {}, keep=1)
    assert latest_checkpoint(tmp_path).name == "step_00000001"
    monkeypatch.undo()
    save_checkpoint(tmp_path, 2, *parts, {}, keep=1)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000002"]


def test_damage_is_named(tmp_path: Path, parts: tuple) -> None:
    saved = save_checkpoint(tmp_path, 1, *parts, {}, keep=1)
    (saved / "ema.safetensors").write_bytes(b"\x00" * 10)
    with pytest.raises(UserError, match="ema.safetensors cannot be read"):
        load_weights(saved, parts[1], "ema.safetensors")
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model.safetensors"):
        latest_checkpoint(tmp_path)


def test_a_run_without_a_checkpoint_or_with_other_data_is_refused(
    tmp_path: Path, small_run: Path
) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    record = json.loads((small_run / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_run(copy)
    (copy / "checkpoints").symlink_to(small_run / "checkpoints")
    record["data_fingerprint"] = "other"
    (copy / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="the data of .* has changed"):
        resume_run(copy, 100, lambda state, values: None)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        load_run(copy)

"""Checkpoints are whole or absent, and damage is found before it is used."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfalign import SiT, UserError
from selfalign.training import checkpoint
from selfalign.training.checkpoint import (
    CHECKSUMS,
    FILES,
    CheckpointState,
    checkpoints,
    choose_checkpoint,
    latest_checkpoint,
    load_optimizer,
    load_weights,
    rewind,
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
        save_checkpoint(tmp_path, *parts, CheckpointState(step), keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000003", "step_00000004"]
    assert latest_checkpoint(tmp_path).name == "step_00000004"
    assert list(tmp_path.glob(".*")) == []


def test_everything_comes_back(tmp_path: Path, parts: tuple) -> None:
    student, ema, optimizer = parts
    saved = save_checkpoint(tmp_path, student, ema, optimizer, CheckpointState(7), keep=1)
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
    save_checkpoint(tmp_path, *parts, CheckpointState(1), keep=1)
    real = checkpoint.write_safetensors

    def full_disk(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if path.stem == failing:
            raise OSError(28, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_safetensors", full_disk)
    with pytest.raises(UserError, match="cannot be written: .*No space left"):
        save_checkpoint(tmp_path, *parts, CheckpointState(2), keep=1)
    assert latest_checkpoint(tmp_path).name == "step_00000001"
    monkeypatch.undo()
    save_checkpoint(tmp_path, *parts, CheckpointState(2), keep=1)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000002"]


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a file as somebody would who knows nothing of checksums."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def first(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if tensors[name].ndim == 2)


TENSORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "extra": lambda t: t.update(evil=torch.zeros(3)),
    "missing": lambda t: t.pop(first(t)),
    "shape": lambda t: t.update({first(t): torch.zeros(3)}),
    "float16": lambda t: t.update({first(t): t[first(t)].half()}),
    "integers": lambda t: t.update({first(t): t[first(t)].int()}),
    "NaN": lambda t: t[first(t)].view(-1)[0].fill_(torch.nan),
    "infinity": lambda t: t[first(t)].view(-1)[0].fill_(-torch.inf),
}
BYTES: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "empty": lambda path: path.write_bytes(b""),
    "header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change", BYTES)
def test_damaged_bytes_are_found_before_they_are_used(
    tmp_path: Path, parts: tuple, file: str, change: str
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, *parts, CheckpointState(step), keep=2)
    BYTES[change](tmp_path / "step_00000002" / file)
    with pytest.raises(UserError, match=f"{file}.*whole checkpoint is that of step 1: .*--step 1"):
        choose_checkpoint(tmp_path, None)
    assert choose_checkpoint(tmp_path, 1).name == "step_00000001"
    BYTES[change](tmp_path / "step_00000001" / file)
    with pytest.raises(UserError, match=f"step_00000002.*{file}") as refusal:
        choose_checkpoint(tmp_path, None)
    assert "--step" not in str(refusal.value)


@pytest.mark.parametrize("file", FILES[:3])
@pytest.mark.parametrize("change", TENSORS)
def test_other_tensors_are_refused_without_checksums_too(
    tmp_path: Path, parts: tuple, file: str, change: str
) -> None:
    """Checkpoints of version 0.1.0 have none."""
    student, ema, optimizer = parts
    saved = save_checkpoint(tmp_path, *parts, CheckpointState(1), keep=2)
    rewrite(saved / file, TENSORS[change])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="checksum"):
        choose_checkpoint(tmp_path, None)
    (saved / CHECKSUMS).unlink()
    assert choose_checkpoint(tmp_path, None) == saved
    load = (
        functools.partial(load_optimizer, saved, student, optimizer)
        if file == "optimizer.safetensors"
        else functools.partial(load_weights, saved, ema, file)
    )
    problem = rf"{file} (does not fit the model|is damaged): "
    with pytest.raises(UserError, match=problem) as refusal:
        load()
    assert "\n" not in str(refusal.value)


OPTIMIZERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "exp_avg is missing of ": lambda t: {
        k: v for k, v in t.items() if not k.startswith("exp_avg|")
    },
    "momentum_buffer is unknown of ": lambda t: (
        t
        | {k.replace("step|", "momentum_buffer|"): t[k].clone() for k in t if k.startswith("step|")}
    ),
    "exp_avg_sq of .* is negative": lambda t: {
        k: v - 1 if k.startswith("exp_avg_sq|") else v for k, v in t.items()
    },
    "step of .* is negative": lambda t: {
        k: v - 9 if k.startswith("step|") else v for k, v in t.items()
    },
}


@pytest.mark.parametrize("problem", OPTIMIZERS)
def test_a_state_that_no_adam_has_is_refused(tmp_path: Path, parts: tuple, problem: str) -> None:
    """Also where every parameter lacks the same, and nothing is odd but the numbers' sign."""
    student, _, optimizer = parts
    saved = save_checkpoint(tmp_path, *parts, CheckpointState(1), keep=2)
    path = saved / "optimizer.safetensors"
    save_file(OPTIMIZERS[problem](load_file(path)), path)
    with pytest.raises(UserError, match=problem):
        load_optimizer(saved, student, optimizer)


def test_sampling_needs_its_weights_and_the_state_only(tmp_path: Path, parts: tuple) -> None:
    saved = save_checkpoint(tmp_path, *parts, CheckpointState(1), keep=2)
    for file in ("optimizer.safetensors", "model.safetensors"):
        (saved / file).unlink()
    assert choose_checkpoint(tmp_path, None, ["ema.safetensors"]) == saved
    with pytest.raises(UserError, match="lacks model.safetensors, optimizer.safetensors"):
        choose_checkpoint(tmp_path, None)


@pytest.mark.parametrize("poisoned", range(3))
def test_nothing_poisoned_is_ever_written(tmp_path: Path, parts: tuple, poisoned: int) -> None:
    save_checkpoint(tmp_path, *parts, CheckpointState(1), keep=1)
    student, ema, optimizer = parts
    with torch.no_grad():
        tensor = (
            next(iter(optimizer.state.values()))["exp_avg"]
            if poisoned == 2
            else next((student, ema)[poisoned].parameters())
        )
        tensor.view(-1)[3] = torch.nan
    with pytest.raises(UserError, match=f"step_00000002 is not written: .* of {FILES[poisoned]}"):
        save_checkpoint(tmp_path, *parts, CheckpointState(2), keep=1)
    assert latest_checkpoint(tmp_path).name == "step_00000001"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "name",
    [b"", b"..", b"../../..", b"/etc", b"step_1/..", b"step\0x", b"\xff\xfe", b"step_0000000x",
     b"x" * 1_000_000, b"step_00000009"],
)  # fmt: skip
def test_latest_names_a_checkpoint_beside_it_and_nothing_else(
    tmp_path: Path, parts: tuple, name: bytes
) -> None:
    save_checkpoint(tmp_path, *parts, CheckpointState(1), keep=1)
    (tmp_path / "latest").write_bytes(name)
    with pytest.raises(UserError, match="--step 1") as refusal:
        choose_checkpoint(tmp_path, None)
    assert "\n" not in str(refusal.value)


def test_the_state_is_that_of_its_folder(tmp_path: Path, parts: tuple) -> None:
    saved = save_checkpoint(tmp_path, *parts, CheckpointState(1), keep=1)
    (saved / CHECKSUMS).unlink()
    for state in ('{"step": 2}', '{"step": -1}', '{"step": "1"}', '{"step": 1e30}', "[]", "{"):
        (saved / "state.json").write_text(state)
        with pytest.raises(UserError, match="state.json"):
            choose_checkpoint(tmp_path, None)
    (saved / "state.json").write_text('{"scaler": null, "step": 1}')  # as version 0.1.0 wrote it
    assert choose_checkpoint(tmp_path, None) == saved


def test_a_checkpoint_is_written_again_after_going_back(tmp_path: Path, parts: tuple) -> None:
    for step in (1, 2):
        saved = save_checkpoint(tmp_path, *parts, CheckpointState(step), keep=2)
    flip_bit(saved / "model.safetensors")
    rewind(tmp_path, choose_checkpoint(tmp_path, 1))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001"]
    assert latest_checkpoint(tmp_path).name == "step_00000001"
    for step in (2, 2):  # and again, over itself
        save_checkpoint(tmp_path, *parts, CheckpointState(step), keep=2)
        assert choose_checkpoint(tmp_path, None).name == "step_00000002"


def test_a_full_disk_keeps_the_earlier_state_and_says_what_is_needed(
    small_disk: Path, parts: tuple
) -> None:
    folder = small_disk / "checkpoints"
    save_checkpoint(folder, *parts, CheckpointState(1), keep=1)
    fill, size = small_disk / "fill", sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    free = shutil.disk_usage(small_disk).free
    for left in (size * 2 // 3, 4096, 0):  # in the weights, the first file, the folder itself
        fill.write_bytes(bytes(max(0, free - left)))
        problem = (
            r"step_00000002 cannot be written: .*it needs [\d.]+ MB, and [\d.]+ [kM]B are free"
        )
        with pytest.raises(UserError, match=problem) as refusal:
            save_checkpoint(folder, *parts, CheckpointState(2), keep=1)
        assert "\n" not in str(refusal.value)
        assert choose_checkpoint(folder, None).name == "step_00000001"
        assert not list(folder.glob(".*"))
        fill.unlink()
    save_checkpoint(folder, *parts, CheckpointState(2), keep=1)
    assert choose_checkpoint(folder, None).name == "step_00000002"

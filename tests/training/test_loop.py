"""A run: exact resume, stopping, accumulation, schedules, and what it leaves behind."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from support import RECIPE_NAMES, assert_same_run, assert_same_state, blocks_of

from selfalign import UserError, override, recipe
from selfalign.config import RunConfig
from selfalign.data.datasets import open_data
from selfalign.data.stream import BatchOfMicroStep
from selfalign.runs.folder import read_record
from selfalign.runs.start import resume_run, start_run
from selfalign.sections import DataConfig, TrainingConfig
from selfalign.signals import stop_signals
from selfalign.training.checkpoint import latest_checkpoint
from selfalign.training.ema import EMA
from selfalign.training.loop import TrainingState
from selfalign.training.step import learning_rate
from selfalign.training.tracking import read_metrics


def quiet(state: TrainingState, values: dict[str, float]) -> None:
    """No progress."""


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {
            "training.gradient_accumulation": 2,
            "data.flip": True,
            "views.whole_image_fraction": 0.25,
        },
        {"training.schedule": "cosine", "training.warmup_steps": 5, "flow.path": "cosine"},
        {
            "objective.terms": ("dispersive",),
            "terms.alignment.decay": "cosine",
            "terms.alignment.decay_steps": 30,
            "terms.alignment.stop_step": 30,
        },
        # Orthogonalises in bf16, which takes ten times as long on CPUs that have no such instructions.
        pytest.param({"training.optimizer": "muon"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulated", "scheduled", "terms", "muon"],
)
def test_resuming_is_exact(tmp_path: Path, overrides: dict[str, object]) -> None:
    every = {"training.evaluate_every": 20, "training.checkpoint_every": 20}
    config = recipe("sra-dts-as", {**SMALL, **every, "training.steps": 40, **overrides})
    start_run(config, tmp_path / "whole", quiet)
    # The same 40 steps, killed right after the checkpoint of step 20.
    halves = tmp_path / "halves"

    class KilledError(Exception):
        pass

    def kill(state: TrainingState, values: dict[str, float]) -> None:
        if state.step == 22:
            raise KilledError

    with pytest.raises(KilledError):
        start_run(config, halves, kill)
    assert read_metrics(halves)[-1]["step"] == 22
    resume_run(halves, None, quiet)
    assert_same_run(tmp_path / "whole", halves)


def test_a_finished_run_goes_on_as_if_it_had_been_longer(tmp_path: Path) -> None:
    config = recipe("sra-dts-as", {**SMALL, "training.steps": 40})
    start_run(config, tmp_path / "whole", quiet)
    start_run(override(config, {"training.steps": 20}), tmp_path / "halves", quiet)
    resume_run(tmp_path / "halves", 40, quiet)
    assert_same_state(tmp_path / "whole", tmp_path / "halves")
    assert resume_run(tmp_path / "halves", 40, quiet) is None  # done: no error
    with pytest.raises(UserError, match="training.steps is 39: 40 steps of .* are done"):
        resume_run(tmp_path / "halves", 39, quiet)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe_trains(tmp_path: Path, name: str) -> None:
    config = recipe(name, {**SMALL, "training.steps": 3, "training.log_every": 1})
    state = start_run(config, tmp_path / "run", quiet)
    assert state.step == 3
    losses = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    aligned = name != "sit"
    assert losses
    assert all(("alignment_loss" in line) == aligned for line in losses)
    assert all(line["alignment_loss"] > 0 for line in losses if aligned)
    assert hasattr(state.student, "ap_head") == aligned


def test_recipes_start_from_the_same_weights_and_see_the_same_noise(tmp_path: Path) -> None:
    first_losses = set()
    for name in ("sit", "sra", "sra-as"):
        config = recipe(name, {**SMALL, "training.steps": 1, "training.log_every": 1})
        start_run(config, tmp_path / name, quiet)
        first_losses.add(read_metrics(tmp_path / name)[0]["denoising_loss"])
    # The untrained output is zero, so the first loss is a function of data, noise and timestep.
    assert max(first_losses) - min(first_losses) < 1e-5


@pytest.mark.parametrize("number", stop_signals())
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "run"
    options = ["--model.size", "tiny/2", "--training.batch-size", "8", "--training.steps", "100000"]
    command = [sys.executable, "-m", "selfalign.cli", "train", "sra-dts-as", "--out", str(folder)]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 90
    while not read_metrics(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    checkpoint = latest_checkpoint(folder / "checkpoints")
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert f"stopped after step {step} of 100000" in output
    assert f"selfalign train --resume {folder}" in output
    state = resume_run(folder, step + 2, quiet)
    assert state is not None and state.step == step + 2


def test_a_run_leaves_what_the_design_says(small_run: Path) -> None:
    assert (small_run / "curves.png").stat().st_size > 1000
    assert [p.name for p in (small_run / "samples").iterdir()] == ["step_00000006.png"]
    config = read_record(small_run).config
    assert blocks_of(config) == (2, 4)
    assert config.model.image_size == (8, 8)
    last = read_metrics(small_run)[-1]
    assert len(last["heldout_ema_by_timestep"]) == len(last["heldout_raw_by_timestep"]) == 10


def test_accumulated_batches_give_the_whole_batch_gradient(tmp_path: Path) -> None:
    # Under `sit` without dropped labels nothing depends on the split but the draws, so compare the
    # first loss only through its mean: both runs see the same images.
    config = recipe("sit", {**SMALL, "training.steps": 2, "training.log_every": 1})
    whole = start_run(config, tmp_path / "a", quiet)
    parts = start_run(
        override(config, {"training.gradient_accumulation": 4}), tmp_path / "b", quiet
    )
    assert whole.step == parts.step == 2
    with pytest.raises(UserError, match="gradient_accumulation is 3"):
        override(config, {"training.gradient_accumulation": 3})


def test_learning_rate_schedules() -> None:
    constant = TrainingConfig(steps=100, learning_rate=1.0, warmup_steps=10)
    assert learning_rate(constant, 0) == pytest.approx(0.1)
    assert learning_rate(constant, 9) == learning_rate(constant, 99) == 1
    cosine = TrainingConfig(steps=110, learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert learning_rate(cosine, 10) == 1
    assert learning_rate(cosine, 60) == pytest.approx(0.5)
    assert learning_rate(cosine, 109) < 0.001


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # Without clipping and with this learning rate the weights overflow within a few steps.
    wild = {"training.learning_rate": 1e30, "training.clip_norm": 0.0, "training.steps": 50}
    config = recipe("sra-dts-as", {**SMALL, **wild, "training.checkpoint_every": 1})
    with pytest.raises(
        UserError, match=r"no longer finite at step \d+ \(its batch: images .* 5 more"
    ):
        start_run(config, folder, quiet)
    weights = load_file(latest_checkpoint(folder / "checkpoints") / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def poisoned_data(monkeypatch: pytest.MonkeyPatch, images: range) -> None:
    """The training images of digits, some of them not numbers."""
    source = open_data(DataConfig())
    pixels = source.train.images.clone()  # type: ignore[attr-defined]
    pixels[list(images), 0, 3, 3] = torch.nan
    split = dataclasses.replace(source.train, images=pixels)  # type: ignore[type-var]
    poisoned = dataclasses.replace(source, train=split)
    monkeypatch.setattr("selfalign.runs.start.open_data", lambda *_: poisoned)


def batch_of(step: int, config: RunConfig) -> list[int]:
    """The images of a step, counted from 1."""
    split = open_data(config.data).train
    batches = BatchOfMicroStep(split, config.seed, config.training.batch_size, 0, 1)
    return batches.indices(step - 1)


@pytest.mark.parametrize("optimizer", ["fused", "other"])
def test_data_that_is_not_finite_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    if optimizer == "other":
        monkeypatch.setattr(torch.optim.AdamW, "_step_supports_amp_scaling", False, raising=False)
    config = recipe("sit", {**SMALL, "training.steps": 20, "training.log_every": 3})
    image = batch_of(4, config)[5]
    poisoned_data(monkeypatch, range(image, image + 1))
    with pytest.raises(UserError, match=f"data is not finite at step 4, .*: image number {image};"):
        start_run(config, tmp_path / "run", quiet)
    allowed = override(config, {"training.on_nonfinite": "skip:1"})
    state = start_run(allowed, tmp_path / "skipping", quiet)
    assert state.step == 20 and state.skipped == 1
    lines = [line for line in read_metrics(tmp_path / "skipping") if "loss" in line]
    assert [line.get("skipped_steps") for line in lines] == [None, *[1] * 6]
    assert all(bool(p.isfinite().all()) for p in state.ema.model.parameters())
    resume_run(tmp_path / "skipping", 22, quiet)
    assert read_metrics(tmp_path / "skipping")[-2]["skipped_steps"] == 1


def test_what_on_nonfinite_allows() -> None:
    for value in ("skip", "skip:0", "skip:-1", "skip:x", "go on"):
        with pytest.raises(UserError, match="on_nonfinite is .*allowed are stop and skip:N"):
            TrainingConfig(on_nonfinite=value)
    assert TrainingConfig(on_nonfinite="skip:12").nonfinite_allowed == 12


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
    ],
)
def test_variables_of_launchers_change_no_number(
    tmp_path: Path, small_run: Path, small_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch, name: str, value: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(name, value)
    start_run(small_config, tmp_path / "run", quiet)
    assert_same_run(small_run, tmp_path / "run")


def test_other_ways_of_sharing_are_refused(
    tmp_path: Path, small_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP is set: .* torchrun"):
        start_run(small_config, tmp_path / "run", quiet)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_a_part_of_what_launchers_set_is_named(
    tmp_path: Path, small_config: RunConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"{name} set without RANK, .*; unset them for one process"):
        start_run(small_config, tmp_path / "run", quiet)


def test_bf16_trains_close_to_float32(tmp_path: Path) -> None:
    config = recipe("sra-dts-as", {**SMALL, "training.log_every": 1})
    start_run(config, tmp_path / "fp32", quiet)
    start_run(override(config, {"training.precision": "bf16"}), tmp_path / "low", quiet)
    full, low = (
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("fp32", "low")
    )
    assert low == pytest.approx(full, rel=0.03)
    assert low != full


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is refused on CPUs only")
def test_fp16_is_refused_on_cpus(tmp_path: Path) -> None:
    config = recipe("sra-dts-as", {**SMALL, "training.precision": "fp16"})
    with pytest.raises(UserError, match="training.precision is 'fp16': not on this device"):
        start_run(config, tmp_path / "run", quiet)


def test_the_average_follows_the_formula(small_config: RunConfig) -> None:
    student = torch.nn.Linear(2, 2)
    ema = EMA(student, decay=0.9)  # type: ignore[arg-type]
    expected = student.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            student.weight.add_(1)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * student.weight.detach()
    assert torch.allclose(ema.model.weight, expected, rtol=1e-5)
    assert EMA(student, 0.9999, warmup=False).decay_at(0) == 0.9999  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in ema.model.parameters())

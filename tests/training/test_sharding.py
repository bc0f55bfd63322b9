"""Processes that share a batch, and a model in shards, train as one process with the whole batch does.

Run by torchrun, this file is one of the processes: it trains the runs that it is told of.
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from support import run_in_processes

from selfalign import UserError, recipe
from selfalign.runs.start import resume_run, start_run
from selfalign.sections import TrainingConfig
from selfalign.training.checkpoint import FILES, checkpoint_name, choose_checkpoint
from selfalign.training.loop import TrainingState
from selfalign.training.sharding import check_sharding
from selfalign.training.tracking import read_metrics

SETTINGS = {
    "model.size": "tiny/4",
    "training.batch_size": 12,
    "training.learning_rate": 1e-3,
    "training.log_every": 1,
    "training.trackers": (),
    "training.ema_decay": (0.9, 0.99),
}
SHARED = {"training.gradient_accumulation": 2}
IDLE = {"terms.alignment.decay": "linear", "terms.alignment.decay_steps": 8} | {
    "terms.alignment.stop_step": 6,
    "training.steps": 10,
}
"""A head that is no longer run."""
RUNS: dict[str, dict[str, Any]] = {
    "none": SHARED,
    "gradients": SHARED | {"training.sharding": "gradients"},
    "full": {"training.sharding": "full"},
    "idle": IDLE | {"training.sharding": "full"},
    "muon": {"training.steps": 10, "training.optimizer": "muon", "training.sharding": "full"},
    "bf16": {"training.steps": 10, "training.precision": "bf16", "training.sharding": "full"}
    | {"model.qk_norm": True},
}
HALF_PRECISION = ("muon", "bf16")
"""Slow on CPUs without instructions for bf16: only with the long ones."""
LONG = (50, (2, 3))


def quiet(state: TrainingState, values: dict[str, float]) -> None:
    """No progress."""


def train_in(processes: int, runs: Sequence[dict[str, Any]]) -> None:
    """Train runs, one after the other, in several processes."""
    run_in_processes(processes, __file__, json.dumps(runs), timeout=1800)


@dataclass(frozen=True)
class Trained:
    """Runs by name and number of processes; `half-P` were gone on with by other processes."""

    folder: Path
    steps: int
    processes: tuple[int, ...]


@pytest.fixture(
    scope="module",
    params=[(10, (2,)), pytest.param(LONG, marks=pytest.mark.slow)],
    ids=["10 steps", "50 steps"],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    steps, counts = request.param
    folder = tmp_path_factory.mktemp("shared")
    lengths = {"training.steps": steps, "training.checkpoint_every": 2 * steps // 5}
    names = RUNS.keys() if request.param == LONG else RUNS.keys() - set(HALF_PRECISION)
    runs = {name: lengths | RUNS[name] for name in sorted(names)}
    for name, changed in runs.items():
        alone = {"training.gradient_accumulation": 1, "training.sharding": "none"}
        config = recipe("sra-dts-as", {**SETTINGS, **changed, **alone})
        start_run(config, folder / f"{name}-1", quiet, ())
    half = {"training.steps": steps // 2, "training.sharding": "full"}
    for processes in counts:
        jobs = [
            {"out": str(folder / f"{name}-{processes}"), "settings": changed}
            for name, changed in {**runs, "half": half}.items()
        ]
        if processes == 3:
            jobs.append({"resume": str(folder / "half-2"), "steps": steps})
        train_in(processes, jobs)
    resume_run(folder / f"half-{counts[-1]}", steps, quiet, (), sharding="none")
    return Trained(folder, steps, counts)


def apart(one: Path, other: Path) -> dict[str, float]:
    """The largest differences of two runs: of losses relative to them, of weights and averages."""
    losses = [
        [line["loss"] for line in read_metrics(folder) if "loss" in line] for folder in (one, other)
    ]
    assert len(losses[0]) == len(losses[1])
    found = {"losses": max(abs(a - b) / a for a, b in zip(*losses, strict=True))}
    for file in ("model.safetensors", "ema.safetensors", "ema-0.99.safetensors", FILES[2]):
        a, b = (
            load_file(choose_checkpoint(folder / "checkpoints", None, FILES) / file)
            for folder in (one, other)
        )
        assert a.keys() == b.keys()
        assert all(a[name].shape == b[name].shape for name in a)
        found[file] = max(float((a[name] - b[name]).abs().max()) for name in a)
    return found


@pytest.mark.parametrize("name", ["none", "gradients", "full", "idle"])
def test_as_one_process_with_the_whole_batch(trained: Trained, name: str) -> None:
    for processes in trained.processes:
        found = apart(trained.folder / f"{name}-1", trained.folder / f"{name}-{processes}")
        assert found["losses"] < 1e-5, found
        assert max(found.values()) < 1e-4, found


def test_resumed_by_others_it_goes_on_as_before(trained: Trained) -> None:
    """By three processes instead of two, and by one without shards."""
    for processes in trained.processes:
        found = apart(trained.folder / "full-1", trained.folder / f"half-{processes}")
        assert found["losses"] < 1e-5, found
        assert max(found.values()) < 1e-4, found


@pytest.mark.slow
@pytest.mark.parametrize("trained", [LONG], indirect=True, ids=["50 steps"])
@pytest.mark.parametrize("name", HALF_PRECISION)
def test_half_precision_is_close(trained: Trained, name: str) -> None:
    """Of weights that are gathered; Muon orthogonalises in bf16, whose sums depend on who adds up what."""
    for processes in trained.processes:
        found = apart(trained.folder / f"{name}-1", trained.folder / f"{name}-{processes}")
        assert found["losses"] < 1e-2, found


def test_checkpoints_are_whole_and_portable(trained: Trained) -> None:
    names = {"checksums.json", "state.json", "ema-0.99.safetensors", *FILES}
    before, last = (checkpoint_name(step) for step in (4 * trained.steps // 5, trained.steps))
    for processes in (1, *trained.processes):
        checkpoints = trained.folder / f"full-{processes}" / "checkpoints"
        found = {path.name for path in checkpoints.iterdir()}
        assert found == {"latest", "monitored", before, last}
        assert {path.name for path in (checkpoints / before).iterdir()} == names


def test_what_cannot_be_sharded_is_refused() -> None:
    settings = TrainingConfig(sharding="full", precision="fp16")
    check_sharding(settings, SimpleNamespace(num_processes=1))  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="sharding takes training.precision fp32 and bf16, not fp16"
    ):
        check_sharding(settings, SimpleNamespace(num_processes=2))  # type: ignore[arg-type]


def main() -> None:
    """Train what the command line says."""
    Accelerator.end_training = lambda self: None  # which ends the group, and there are further runs
    for run in json.loads(sys.argv[1]):
        if "resume" in run:
            resume_run(Path(run["resume"]), run["steps"], quiet, ())
        else:
            config = recipe("sra-dts-as", {**SETTINGS, **run["settings"]})
            start_run(config, Path(run["out"]), quiet, ())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as tests/training/test_fsdp2.py has it


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error", ResourceWarning)
    main()

"""A run that is killed at any moment and resumed ends as if nothing had happened."""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL
from safetensors.torch import load_file
from support import assert_same_run, on_cpus

from selfalign import RunConfig, recipe
from selfalign.runs.monitors import HeldOutMonitor
from selfalign.runs.start import resume_run, start_run
from selfalign.training import checkpoint
from selfalign.training.loop import TrainingState

pytestmark = on_cpus
MONITORS = (HeldOutMonitor(3),)
CONFIG = {
    **SMALL,
    "training.steps": 6,
    "training.log_every": 1,
    "training.checkpoint_every": 1,
    "training.evaluate_every": 3,
    "training.keep_checkpoints": 2,
}
"""Writes and prunes a checkpoint at every step, so that kills hit these too."""


def quiet(state: TrainingState, values: dict[str, float]) -> None:
    """No progress."""


def go_on(config: RunConfig, folder: Path) -> None:
    """What a supervisor's loop does: resume, or start what has not begun."""
    if (folder / "config.json").exists():
        resume_run(folder, None, quiet, MONITORS)
    else:
        start_run(config, folder, quiet, MONITORS)


def in_child(
    work: Callable[[RunConfig, Path], None],
    config: RunConfig,
    folder: Path,
    seconds: float | None = None,
) -> int:
    """Do something in a forked process, which is killed after a time. Returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work(config, folder)
        except BaseException:  # noqa: BLE001 – it must not go on as a second pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, float]:
    """The run without interruptions, and how long it takes."""
    config = recipe("sra-dts-as", CONFIG)
    folder = tmp_path_factory.mktemp("whole") / "run"
    begun = time.perf_counter()
    assert in_child(go_on, config, folder) == 0
    return config, folder, time.perf_counter() - begun


def assert_whole(folder: Path, expected: Path) -> None:
    """The same weights, average, optimizer and metrics, and nothing beside them."""
    assert_same_run(expected, folder)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names == {str(path.relative_to(expected)) for path in expected.rglob("*")}


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    tmp_path: Path, whole: tuple[RunConfig, Path, float], rounds: int
) -> None:
    config, expected, seconds = whole
    moments = random.Random(rounds)
    kills = 0
    for _ in range(rounds):
        folder = tmp_path / "run"
        for _ in range(2):
            code = in_child(go_on, config, folder, moments.uniform(0, seconds))
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert in_child(go_on, config, folder) == 0
        assert_whole(folder, expected)
        shutil.rmtree(folder)
    print(f"{kills} kills", file=sys.stderr)


def _kill_at(call: int) -> None:
    """Have this process die at the call-th time that it changes the disk."""
    calls = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **settings: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        return wrapper

    for owner, name in (
        *((Path, name) for name in ("replace", "rename", "mkdir", "unlink", "write_text")),
        (os, "fsync"),
        (os, "rmdir"),
        (os, "unlink"),
        (checkpoint, "write_safetensors"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("stride", [47, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_between_any_two_changes_of_the_disk(
    tmp_path: Path, whole: tuple[RunConfig, Path, float], stride: int
) -> None:
    """Six checkpoints that are written and four that are pruned make more than a hundred changes."""
    config, expected, _ = whole

    def dies(config: RunConfig, folder: Path) -> None:
        _kill_at(int(folder.name))
        go_on(config, folder)

    call = 1
    while in_child(dies, config, folder := tmp_path / str(call)) != 0:
        assert in_child(go_on, config, folder) == 0
        assert_whole(folder, expected)
        shutil.rmtree(folder)
        call += stride
    assert call > 90


def test_what_the_last_process_did_not_drop_is_dropped(
    tmp_path: Path, whole: tuple[RunConfig, Path, float]
) -> None:
    """A process that dies between its last checkpoint and the dropping of old ones."""
    config, expected, _ = whole
    folder = tmp_path / "run"
    shutil.copytree(expected, folder)
    place = folder / "checkpoints"
    shutil.copytree(place / "step_00000005", place / "step_00000004")
    shutil.copytree(place / "step_00000005", place / ".step_00000003.dropped.partial")
    (place / "monitored").unlink()
    assert in_child(go_on, config, folder) == 0
    assert_whole(folder, expected)


def test_what_is_compared(whole: tuple[RunConfig, Path, float]) -> None:
    _, expected, _ = whole
    kept = checkpoint.checkpoints(expected / "checkpoints")
    assert [checkpoint.step_of(path) for path in kept] == [5, 6]
    assert load_file(kept[-1] / "optimizer.safetensors")

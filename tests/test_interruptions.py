"""Ctrl-C and SIGTERM: exit codes, what is left, and how to go on; output that cannot be shown."""

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

from selfalign import processes, recipe
from selfalign.cli import COMMANDS, main
from selfalign.cli.console import console
from selfalign.cli.interruption import GO_ON
from selfalign.data.latents import prepare as preparing
from selfalign.disk import LOCK
from selfalign.errors import Interrupted
from selfalign.evaluation import generation
from selfalign.runs.start import resume_run, start_run
from selfalign.sampling import generate as sampling_generate
from selfalign.signals import stop_signals
from selfalign.training.checkpoint import latest_checkpoint
from selfalign.training.loop import TrainingState
from selfalign.training.tracking import read_metrics

SIGNALS = stop_signals()


def interrupting(function: Callable[..., Any], number: int, call: int = 1) -> Callable[..., Any]:
    """The function, which sends this process a signal when it is called for the call-th time."""
    calls = 0

    def wrapper(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **settings)

    return wrapper


@pytest.mark.parametrize("number", SIGNALS)
def test_sampling(
    small_run: Path, tmp_path: Path, number: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    handlers = [signal.getsignal(n) for n in SIGNALS]
    generate = interrupting(sampling_generate.generate, number)
    monkeypatch.setattr(sampling_generate, "generate", generate)
    code = main(["sample", str(small_run), "--out", str(tmp_path / "o"), "--steps", "1"])
    assert code == 128 + number
    said = capsys.readouterr().err
    assert said == (
        "selfalign: interrupted: nothing was written; the same command makes the same samples\n"
    )
    assert not (tmp_path / "o").exists()
    assert [signal.getsignal(n) for n in SIGNALS] == handlers


@pytest.mark.parametrize("number", SIGNALS)
def test_evaluating_goes_on_with_the_samples_that_were_finished(
    small_run: Path, tmp_path: Path, number: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = shutil.copytree(small_run, tmp_path / "run")
    monkeypatch.setattr(generation, "SHARD", 10)
    write = generation._write_shard
    monkeypatch.setattr(generation, "_write_shard", interrupting(write, number, 3))
    command = ["evaluate", str(run), "--num", "40", "--steps", "1", "--metrics", "denoising"]
    assert main(command) == 128 + number
    assert "the same command goes on" in capsys.readouterr().err
    made = []
    monkeypatch.setattr(
        generation, "_write_shard", lambda *shard: (made.append(shard), write(*shard))
    )
    assert main(command) == 0
    assert len(made) == 2


@pytest.mark.parametrize("number", SIGNALS)
def test_preparing(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preparing, "prepare", interrupting(preparing.prepare, number))
    assert main(["prepare", str(tmp_path), str(tmp_path / "o"), "--vae", "none"]) == 128 + number
    assert "finished files are kept" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "report"])
def test_looking_into_runs(
    small_run: Path, command: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    opening = interrupting(processes.open_accelerator, signal.SIGTERM)
    monkeypatch.setattr(processes, "open_accelerator", opening)
    assert main([command, str(small_run)]) == 128 + signal.SIGTERM
    assert "; the same command makes the " in capsys.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_while_the_program_ends_keeps_its_exit_code(number: int) -> None:
    code = (
        "import atexit, os, signal, sys, types\n"
        "from selfalign import cli\n"
        f"def interrupt(words): os.kill(os.getpid(), {number})\n"
        "sys.modules['selfalign.cli.recipes'] = types.SimpleNamespace(recipes_command=interrupt)\n"
        f"atexit.register(os.kill, os.getpid(), {number})\n"
        "sys.argv = ['selfalign', 'recipes']\n"
        "sys.exit(cli.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (128 + number, "selfalign: interrupted\n")


def test_every_command_but_those_that_answer_at_once_says_how_to_go_on() -> None:
    assert GO_ON.keys() == COMMANDS.keys() - {"diff", "recipes", "completion"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_training_at_once(tmp_path: Path, number: int) -> None:
    config = recipe("sra-dts-as", {**SMALL, "training.steps": 50, "training.checkpoint_every": 10})
    folder = tmp_path / "run"

    def twice(state: TrainingState, values: dict[str, float]) -> None:
        if state.step == 14:
            for _ in range(2):
                os.kill(os.getpid(), number)
                time.sleep(0.01)

    with pytest.raises(Interrupted) as interruption:
        start_run(config, folder, twice)
    assert interruption.value.number == number
    assert latest_checkpoint(folder / "checkpoints").name == "step_00000010"
    assert not (folder / LOCK).exists()
    state = resume_run(folder, 16, lambda state, values: None)
    assert state is not None and state.step == 16


def test_a_launchers_death_is_told_once_per_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several SIGTERMs of one death are no second wish to stop."""
    config = recipe("sra-dts-as", {**SMALL, "training.steps": 50})

    def dies(state: TrainingState, values: dict[str, float]) -> None:
        if state.step == 14:
            monkeypatch.setattr(os, "getppid", lambda: 1)
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

    state = start_run(config, tmp_path / "run", dies)
    assert state.step < 50 and state.stopped_by == signal.SIGTERM
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of a parent's death")
def test_a_run_whose_launcher_was_killed_stops_at_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {
        "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    options = [
        "--model.size",
        "tiny/4",
        "--training.batch-size",
        "8",
        "--training.steps",
        "1000000",
    ]
    command = [
        sys.executable,
        "-m",
        "selfalign.cli",
        "train",
        "sit",
        "--out",
        str(folder),
        *options,
    ]
    launcher = (
        "import subprocess, sys; process = subprocess.Popen(sys.argv[1:]); "
        "print(process.pid, flush=True); process.wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", launcher, *command],
        env={**os.environ, **launched},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 300
    while not read_metrics(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    parent.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{child}").exists()
    assert latest_checkpoint(folder / "checkpoints").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of a parent's death")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_run_whose_accelerate_launch_was_ended_stops_at_a_checkpoint(
    tmp_path: Path, number: int
) -> None:
    """It starts a single process without any variable that says so, and ends without it."""
    folder = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "selfalign.cli", "train", "sit", "--out", str(folder), "--model.size", "tiny/4"),
        *("--training.batch-size", "8", "--training.steps", "1000000"),
    ]
    launcher = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not read_metrics(folder) and time.monotonic() < deadline:
            time.sleep(0.2)
        launcher.send_signal(number)
        launcher.wait(60)
        deadline = time.monotonic() + 60
        while (folder / LOCK).exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not (folder / LOCK).exists()
        assert latest_checkpoint(folder / "checkpoints").is_dir()
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it left behind, in its own session
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), OSError(28, "full")])
def test_output_that_nobody_takes_ends_no_work(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(console, "_file", Closed())
    monkeypatch.setattr(console, "quiet", False)
    console.print("a line that cannot be written")
    console.print("and no second try")
    assert console.quiet


@pytest.mark.parametrize(
    "encoding",
    ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("utf-8", "cp1252"))],
)
def test_any_name_is_shown_in_any_encoding(small_run: Path, tmp_path: Path, encoding: str) -> None:
    run = tmp_path / "[/x] $5_$ <b> [red]\n名前 \udcff"
    shutil.copytree(small_run, run)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "selfalign.cli", "sample", run, "--out", run / "o", "--num", "2",
         "--steps", "1"],
        env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"[/x] $5_$ <b> [red]" in done.stdout and done.stderr == b""


def test_our_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = warnings.formatwarning("a\nb", UserWarning, "x/selfalign/training/loop.py", 3)
    assert shown == "selfalign: warning: a b\n"


def test_our_warnings_end_no_work_where_warnings_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        assert main(["recipes"]) == 0
    assert "decides over training.tf32" in str(caught[0].message)

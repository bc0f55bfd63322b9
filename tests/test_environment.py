"""Variables that launchers and profiles set: what torch and accelerate would fail at is one line."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfalign.cli import main
from selfalign.disk import cache_folder
from selfalign.environment import check_environment, is_first_process
from selfalign.errors import UserError, told_by_machine

LAUNCHED = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        LAUNCHED,
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
        {"ACCELERATE_USE_CPU": "True", "ACCELERATE_LOG_LEVEL": "warning", "USE_TORCH_XLA": "0"},
        {**LAUNCHED, "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_what_is_complete_is_taken(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_environment()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_LOG_LEVEL": "x"}, "ACCELERATE_LOG_LEVEL is 'x': allowed are .*info"),
        ({"ACCELERATE_LOG_LEVEL": "10"}, "ACCELERATE_LOG_LEVEL is '10'"),
        ({"ACCELERATE_USE_CPU": ""}, "ACCELERATE_USE_CPU is '': allowed are true and false"),
        ({"ACCELERATE_DEBUG_MODE": "x"}, "ACCELERATE_DEBUG_MODE is 'x'"),
        ({"USE_TORCH_XLA": "maybe"}, "USE_TORCH_XLA is 'maybe'"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED is set: .*torchrun"),
        ({"RANK": "1"}, "RANK set without WORLD_SIZE, .*; unset them for one process"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE set without RANK"),
        ({"LOCAL_RANK": "0", "RANK": "0"}, "RANK, LOCAL_RANK set without WORLD_SIZE"),
        ({**LAUNCHED, "RANK": "x"}, "RANK is 'x': allowed is a whole number"),
        ({**LAUNCHED, "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({**LAUNCHED, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({**LAUNCHED, "RANK": "2"}, "RANK is 2: allowed is less than WORLD_SIZE, 2"),
        ({**LAUNCHED, "LOCAL_RANK": "3"}, "LOCAL_RANK is 3: allowed is less than LOCAL_WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is '4': .*launch with torchrun"),
        ({"PMI_SIZE": "x"}, "PMI_SIZE is 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    said: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        check_environment()
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_overrides_a_setting_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.warns(UserWarning, match="NVIDIA_TF32_OVERRIDE is '0'"):
        check_environment()


def test_a_process_with_a_number_of_its_own_is_no_silent_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["sample", "run", "--out", "x"]) == 2
    assert "RANK set without" in capsys.readouterr().err


def test_a_package_that_cannot_be_imported_is_one_line(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("def fail():\n    raise ValueError('no\\nlevel')\n")
    (tmp_path / "uses_it.py").write_text("import broken_package\nbroken_package.fail()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="no") as failed:
        __import__("uses_it")
    told = told_by_machine(failed.value)
    assert told is not None
    assert told.startswith("uses_it cannot be imported (ValueError: no level)")


def test_without_a_home_the_cache_goes_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SELFALIGN_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    folder = cache_folder("kernels")
    assert folder == cache_folder("kernels")
    assert folder.parent.stat().st_mode & 0o077 == 0  # what lies in it is run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_waiting_for_processes_that_never_come_ends_on_a_signal(tmp_path, number: int) -> None:
    """torch waits for them without Python, which would hear of the signal half an hour later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, **LAUNCHED, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}
    words = ["train", "sit", "--out", str(tmp_path / "run"), "--data.name", "digits"]
    with subprocess.Popen(
        [sys.executable, "-m", "selfalign.cli", *words], env=environment, stderr=subprocess.PIPE
    ) as process:
        wait_until_listening(int(port))
        time.sleep(0.5)
        process.send_signal(number)
        try:
            assert process.wait(20) in (-number, 128 + number)
        finally:
            process.kill()
    assert not (tmp_path / "run").exists()
    assert is_first_process()


def wait_until_listening(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the first process never waited")

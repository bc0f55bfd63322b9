"""Ctrl-C, SIGTERM and a full disk while a run is sampled and evaluated."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfalign.cli import main


def test_what_was_written_when_interrupted_is_whole(
    evaluated: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write of the command in turn; afterwards the same command gives the same report."""
    words, kept = evaluated
    expected = (kept / "evaluation.json").read_bytes()
    replace, calls = Path.replace, [0]
    for moment in range(7):
        for file in sorted(kept.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        calls[0] = 0

        def interrupted(path: Path, target: Path, moment: int = moment) -> Path:
            calls[0] += 1
            if calls[0] - 1 == moment:
                os.kill(os.getpid(), signal.SIGTERM)
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", interrupted)
            assert main(words) == 143
        assert not [path for path in kept.rglob("*") if ".partial" in path.name]
        assert main(words) == 0
        assert (kept / "evaluation.json").read_bytes() == expected
    assert calls[0] == 7  # three shards, samples, their settings, report and picture: all tried


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_signal_to_the_command(run_folder: Path, number: int, code: int) -> None:
    command = [sys.executable, "-m", "selfalign.cli", "evaluate", str(run_folder)]
    process = subprocess.Popen(
        [*command, "--num", "3000", "--steps", "20", "--metrics", "fd"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not list(run_folder.rglob("shards/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.count("\n") == 1 and "the same command goes on" in said
    assert not list(run_folder.rglob(".*.partial*"))


def test_a_full_disk_is_one_line(
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever write fails: the error names the file, and nothing half-written stays."""
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "run", "--num", "30", "--steps", "1", "--metrics", "fd"]
    replace, calls = Path.replace, [0]
    for moment in range(5):
        calls[0] = 0

        def full(path: Path, target: Path, moment: int = moment) -> Path:
            calls[0] += 1
            if calls[0] - 1 == moment:
                raise OSError(28, "No space left on device")
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            code = main(words)
        said = capsys.readouterr().err
        if code == 0:  # fewer writes are left, the further the earlier tries came
            break
        assert code == 2
        assert said.count("\n") == 1 and "cannot be written" in said and "No space left" in said
        assert not list(run_folder.rglob(".*.partial*"))
    assert main(words) == 0

"""The documented launch lines, and processes that die: the others end, or all go on from the checkpoint."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from selfalign.runs.folder import read_record
from selfalign.training.checkpoint import latest_checkpoint
from selfalign.training.tracking import read_metrics

OPTIONS = [
    *("--model.size", "tiny/4", "--training.steps", "30", "--training.batch-size", "8"),
    *("--training.log-every", "1", "--training.checkpoint-every", "5", "--training.trackers"),
    *("--training.heldout-samples", "20", "--data.name", "digits"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def start(launch: list[str], *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launch, "-m", "selfalign.cli", *map(str, words)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def worker(launcher: int, rank: int) -> int:
    """The process of a launcher that has a rank."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            variables = process.joinpath("environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if parent == launcher and b"RANK=%d" % rank in variables:
            return int(process.name)
    raise AssertionError("there is no such process")


def kill_a_worker_after(launched: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while not any(line["step"] >= step for line in read_metrics(run)):
        assert time.monotonic() < deadline and launched.poll() is None
        time.sleep(0.1)
    os.kill(worker(launched.pid, 1), signal.SIGKILL)


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    launch = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    steps = ["--training.steps", "100000"]
    launched = start(launch, "train", "sra", "--out", tmp_path / "run", *OPTIONS, *steps)
    kill_a_worker_after(launched, tmp_path / "run", 3)
    killed = time.monotonic()
    said, _ = launched.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert launched.returncode != 0
    assert "SIGKILL" in said


@pytest.mark.slow
def test_restarted_by_its_launcher_a_run_goes_on(tmp_path: Path) -> None:
    launch = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    run = tmp_path / "run"
    launched = start(launch, "train", "sra", "--out", run, *OPTIONS, "--training.sharding", "full")
    kill_a_worker_after(launched, run, 7)  # while a checkpoint may be written
    said, _ = launched.communicate(timeout=600)
    assert launched.returncode == 0, said
    assert latest_checkpoint(run / "checkpoints").name == "step_00000030"
    steps = [line["step"] for line in read_metrics(run) if "loss" in line]
    assert steps == list(range(1, 31))
    assert read_record(run).config.training.batch_size == 8


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_groups_of_processes_train_one_run(tmp_path: Path, launcher: str) -> None:
    """As two nodes do, but on one machine."""
    port = free_port()
    groups = []
    for node in range(2):
        launch = [
            *TORCHRUN,
            *("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7"),
        ]
        if launcher == "accelerate":
            launch = [
                *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
                *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(node)),
                *("--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
            ]
        groups.append(start(launch, "train", "sra", "--out", tmp_path / "run", *OPTIONS))
    said = [group.communicate(timeout=600)[0] for group in groups]
    assert [group.returncode for group in groups] == [0, 0], "\n".join(said)
    losses = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 30


@pytest.mark.parametrize(
    "words",
    [
        ["train", "sra-dts-as", "--out", "r", "--training.batch-size", "8", "--seed", "3"],
        [
            "evaluate",
            "r",
            "--num-samples",
            "600",
            "--steps",
            "3",
            "--out",
            "o",
            "--protocol",
            "adm",
        ],
    ],
)
def test_torchrun_takes_no_option_for_one_of_its_own(words: list[str]) -> None:
    parsed = get_args_parser().parse_args(["--standalone", "-m", "selfalign.cli", *words])
    assert parsed.training_script_args == words
    parsed = get_args_parser().parse_args(["-m", "selfalign.cli", words[0], *words[1:]])
    assert parsed.training_script == "selfalign.cli"

"""Two processes share every batch and agree on everything."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from small_images import make_images
from support import in_two_processes, torchrun

from selfalign.errors import UserError
from selfalign.processes import open_accelerator
from selfalign.runs.folder import read_record
from selfalign.training.checkpoint import checkpoint_name, latest_checkpoint
from selfalign.training.tracking import read_metrics

OPTIONS = [
    *("--model.size", "tiny/2", "--training.steps", "4", "--training.batch-size", "16"),
    *("--training.log-every", "2", "--training.heldout-samples", "20"),
]


def _train_in_two_processes(out: Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "selfalign.cli", "train", "sra-dts-as", "--out", str(out)]
    return subprocess.run(
        [*torchrun(2), *command, *OPTIONS],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would end in an error of NCCL that says nothing of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match="2 processes were started on this machine, and it has 1 GPU"
    ):
        open_accelerator()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    open_accelerator()


def test_a_used_folder_is_refused_once(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    done = _train_in_two_processes(tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("selfalign: error: ") == 1, done.stderr
    assert "must be a new or an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_is_not_shared_is_done_by_the_first_process_alone(
    small_run: Path, tmp_path: Path
) -> None:
    """sample, prepare and study write one result each, and start no group that nobody else joins."""
    out = tmp_path / "samples"
    codes, said = zip(
        *in_two_processes("sample", small_run, "--out", out, "--num", "2", "--steps", "1"),
        strict=True,
    )
    assert codes == (0, 0), said
    assert sorted(path.name for path in out.iterdir()) == [
        "grid.png",
        "samples.npz",
        "sampling.json",
    ]
    store = tmp_path / "store"
    make_images(tmp_path / "images", 8)
    command = ("prepare", tmp_path / "images", store, "--vae", "none", "--image-size", "8")
    codes, said = zip(*in_two_processes(*command), strict=True)
    assert codes == (0, 0), said
    assert said == ("", "")
    assert (store / "manifest.json").is_file()


def test_two_processes_train_one_run(tmp_path: Path) -> None:
    done = _train_in_two_processes(tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 4]  # two of training, one of held-out losses
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 4
    assert read_record(tmp_path / "run").config.training.batch_size == 16


def test_what_only_one_process_cannot_do_ends_both_with_one_line(tmp_path: Path) -> None:
    """Only the main process writes checkpoints; the other one has to hear of it."""
    run = tmp_path / "run"
    command = ("train", "sra-dts-as", "--out", run, "--data.name", "digits", *OPTIONS)
    codes, said = zip(*in_two_processes(*command), strict=True)
    assert codes == (0, 0), said
    checkpoints = run / "checkpoints"
    command = ("train", "--resume", run, "--training.steps", "6")
    codes, said = zip(*in_two_processes(*command, largest_file=100_000), strict=True)
    assert codes == (2, 2), said
    assert "cannot be written" in said[0] and said[0].count("selfalign: error") == 1
    assert "selfalign: error" not in said[1]
    assert latest_checkpoint(checkpoints).name == checkpoint_name(4)


def test_a_finished_run_is_a_success(small_run: Path) -> None:
    codes, said = zip(*in_two_processes("train", "--resume", small_run), strict=True)
    assert codes == (0, 0), said

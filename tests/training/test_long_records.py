"""Records of long runs: read in part for curves, and gone on with as they are."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from selfalign.training.tracking import Metrics, read_metrics

HELDOUT = {
    "heldout_ema": 1.0,
    "heldout_raw": 1.0,
    "heldout_ema_by_timestep": [1.0],
    "heldout_raw_by_timestep": [1.0],
}


def write(folder: Path, lines: int) -> None:
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            file.write(json.dumps({"step": step, "loss": 1.5, "gradient_norm": 0.1}) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps({"step": step, **HELDOUT}) + "\n")


def test_a_curve_reads_a_part_of_the_losses_and_all_else(tmp_path: Path) -> None:
    assert read_metrics(tmp_path, 100) == []
    write(tmp_path, 40_100)
    everything, some = read_metrics(tmp_path), read_metrics(tmp_path, 1000)
    heldout = [line for line in everything if "heldout_ema" in line]
    assert [line for line in some if "heldout_ema" in line] == heldout and len(heldout) == 40
    assert 1000 <= len(some) - 40 <= 1100
    assert all(line in everything for line in some[:50])
    assert some[-1] == everything[-1] and some[-1]["step"] == 40_100
    assert read_metrics(tmp_path, 10**9) == everything


def test_going_on_keeps_the_lines_before_byte_by_byte(tmp_path: Path) -> None:
    write(tmp_path, 3000)
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    damaged = [*before[:2500], b'{"step": 2501, "loss": 1.5, "gr', b"\0\0\n", *before[2500:]]
    path.write_bytes(b"".join(damaged))
    Metrics(tmp_path, Accelerator(), 2000)
    after = path.read_bytes().splitlines(keepends=True)
    assert after == [line for line in before if json.loads(line)["step"] <= 2000]
    Metrics(tmp_path, Accelerator(), 1000, monitored=False)
    last = read_metrics(tmp_path)[-1]
    assert last["step"] == 1000 and "loss" in last


@pytest.mark.parametrize("line", [b"", b"{}", b'{"step": "x"}', b"[1]", b"\xff", b'{"step": 1e9}'])
def test_what_is_no_line_is_left_out(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(line + b'\n{"step": 1, "loss": NaN}\n{"step": 2}')
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2]

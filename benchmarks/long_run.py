"""A long run of the smallest model: memory, open files and step time over 20,000 steps; and its long record.

python benchmarks/long_run.py                       as it says
python benchmarks/long_run.py --steps 1000          a shorter one
"""

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from selfalign import recipe
from selfalign.backbones.sit.sizes import SIZES, Size
from selfalign.runs.start import start_run
from selfalign.training.loop import TrainingState
from selfalign.training.tracking import FOR_CURVES, read_metrics

LINES = 4_000_000


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(steps: int, folder: Path) -> list[dict[str, float]]:
    """A run with checkpoints and trackers; what was in use at ten points of it."""
    SIZES["least"] = Size(48, 2, 2)
    settings = {
        "model.size": "least/4",
        "training.steps": steps,
        "training.batch_size": 2,
        "training.log_every": 10,
        "training.checkpoint_every": steps // 40,
        "training.evaluate_every": steps // 4,
        "training.sample_every": steps // 4,
        "training.heldout_samples": 20,
    }
    seen: list[dict[str, float]] = []
    clock = [time.process_time(), 0.0]

    def look(state: TrainingState, values: dict[str, float]) -> None:
        if state.step % (steps // 10):
            return
        now = time.process_time()
        gc.collect()
        seen.append(
            {
                "step": state.step,
                "resident_mib": round(resident_mib(), 1),
                "open_files": len(list(Path("/proc/self/fd").iterdir())),
                "objects": len(gc.get_objects()),
                "cpu_ms_per_step": round(1e3 * (now - clock[0]) / (state.step - clock[1]), 3),
            }
        )
        clock[:] = [time.process_time(), float(state.step)]

    start_run(recipe("sra-dts-as", settings), folder, look)
    return seen


def read_long_record(folder: Path) -> dict[str, float]:
    """Seconds that a record of millions of lines takes to be read for a page."""
    values = dict.fromkeys(
        ("loss", "denoising_loss", "alignment_loss", "gradient_norm"), 0.123456789
    )
    line = json.dumps({"step": 0, **values, "learning_rate": 1e-4, "samples_per_second": 812.3})
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(LINES):
            file.write(line.replace('"step": 0', f'"step": {step}') + "\n")
    started = time.perf_counter(), time.process_time()
    lines = read_metrics(folder, FOR_CURVES)
    return {
        "lines": LINES,
        "gigabytes": round((folder / "metrics.jsonl").stat().st_size / 1e9, 2),
        "kept": len(lines),
        "seconds": round(time.perf_counter() - started[0], 1),
        "cpu_seconds": round(time.process_time() - started[1], 1),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for row in train(steps, Path(folder) / "run"):
            print(json.dumps(row), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(read_long_record(Path(folder))))


if __name__ == "__main__":
    main()

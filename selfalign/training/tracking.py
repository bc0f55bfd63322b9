"""Metrics: a line of JSON per logged step, and accelerate's trackers."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class Metrics:
    """Writes `metrics.jsonl` and the trackers, from the main process only.

    Args:
        folder: the run's folder.
        accelerator: knows the trackers and which process is the main one.
        step: steps done; lines after it, from before an interruption, are dropped.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, step: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._accelerator = accelerator
        if accelerator.is_main_process:
            kept = [
                line
                for line in (self._path.read_text().splitlines() if self._path.exists() else [])
                if _step_of(line) <= step
            ]
            self._path.write_text("".join(f"{line}\n" for line in kept))
        accelerator.init_trackers("run", init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record values of a step; lists go to metrics.jsonl only."""
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        self._accelerator.log(numbers, step=step)

    def close(self) -> None:
        """Flush the trackers."""
        self._accelerator.end_training()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a line cut off by a crash is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) != float("inf")]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")

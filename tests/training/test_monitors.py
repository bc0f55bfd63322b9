"""What looks at a run may fail; the run goes on, and its checkpoint is there."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from conftest import SMALL

from selfalign import RunConfig, override, recipe
from selfalign.data.datasets import open_data
from selfalign.runs.monitors import CurvesMonitor, GridMonitor, HeldOutMonitor
from selfalign.runs.start import start_run
from selfalign.sampling.pictures import column_names, draw_curves
from selfalign.sections import DataConfig
from selfalign.training.checkpoint import checkpoints, is_monitored, latest_checkpoint, step_of
from selfalign.training.loop import TrainingState
from selfalign.training.tracking import read_metrics


def quiet(state: TrainingState, values: dict[str, float]) -> None:
    """No progress."""


@dataclass(frozen=True)
class Failing:
    """Raises whatever it is given."""

    error: BaseException
    every: int = 2
    seen: list[int] = field(default_factory=list)

    def __call__(self, state: TrainingState) -> None:
        """Remember the last checkpoint, and fail."""
        self.seen.append(step_of(latest_checkpoint(state.folder / "checkpoints")))
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a $ b"),
        MemoryError(),
        OSError(28, "full"),
        AssertionError(),
        SystemExit(3),
        RecursionError(),
    ],
)
def test_a_failing_monitor_costs_no_step(
    tmp_path: Path, small_config: RunConfig, error: BaseException
) -> None:
    monitor = Failing(error)
    with pytest.warns(UserWarning, match="Failing failed at step 2, and training goes on") as told:
        state = start_run(small_config, tmp_path / "run", quiet, [monitor, HeldOutMonitor(0)])
    assert len([warning for warning in told if "Failing" in str(warning.message)]) == 1
    assert state.step == 6
    assert monitor.seen == [2, 2, 6]  # a checkpoint before the first, and one at the end
    assert [step_of(path) for path in checkpoints(tmp_path / "run" / "checkpoints")] == [2, 6]
    assert is_monitored(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert "heldout_ema" in read_metrics(tmp_path / "run")[-1]


def test_a_monitor_that_is_told_to_stop_stops(tmp_path: Path, small_config: RunConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        start_run(small_config, tmp_path / "run", quiet, [Failing(KeyboardInterrupt())])
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert step_of(checkpoint) == 2 and not is_monitored(checkpoint)


@pytest.mark.parametrize(
    ("of", "method"),
    [(Accelerator, "init_trackers"), (Accelerator, "log"), (TensorBoardTracker, "finish")],
)
def test_a_failing_tracker_costs_no_step(
    tmp_path: Path,
    small_config: RunConfig,
    of: type,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(of, method, fail)
    config = override(small_config, {"training.trackers": ("tensorboard",)})
    with pytest.warns(UserWarning, match="trackers get no more values.*no server") as told:
        state = start_run(config, tmp_path / "run", quiet, [])
    assert len([warning for warning in told if "trackers" in str(warning.message)]) == 1
    assert state.step == 6 and len(read_metrics(tmp_path / "run")) == 3


NAMES = ["cheap $5_$10", "[x]", "<b>&amp;", "a\nb\0", "\udcff", "\u202eright to left", "名前 😀", "",
         "x" * 300, r"\frac{", "^_{", "%s %d {0}"]  # fmt: skip


def test_any_class_name_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    source = dataclasses.replace(open_data(DataConfig()), class_names=tuple(NAMES[:10]))
    monkeypatch.setattr("selfalign.runs.start.open_data", lambda config: source)
    config = recipe("sit", {**SMALL, "training.steps": 2})
    folder = tmp_path / "$x_$ [/x]\n\udcff"
    start_run(config, folder, quiet, [GridMonitor(0), CurvesMonitor(0)])
    assert (folder / "samples" / "step_00000002.png").is_file()
    assert (folder / "curves.png").is_file()
    assert [str(warning.message) for warning in recwarn if "failed" in str(warning.message)] == []


@pytest.mark.parametrize("name", NAMES)
def test_any_title_is_drawn(tmp_path: Path, name: str) -> None:
    draw_curves(tmp_path / "curves.png", [], name)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_classes_without_a_name_are_numbers() -> None:
    assert column_names([0, 1, 2], ["a", "b"]) == ["a", "b", "2"]


def test_a_model_may_have_more_classes_than_its_data(tmp_path: Path) -> None:
    config = recipe("sit", {**SMALL, "training.steps": 2, "model.num_classes": 25})
    start_run(config, tmp_path / "run", quiet, [GridMonitor(0)])
    assert (tmp_path / "run" / "samples" / "step_00000002.png").is_file()

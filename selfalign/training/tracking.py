"""Metrics: a line of JSON per logged step, and accelerate's trackers."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from accelerate import Accelerator
from PIL import Image

from selfalign.config import RunConfig, config_to_dict
from selfalign.disk import reason, write_whole
from selfalign.errors import UserError
from selfalign.pages.settings import flatten, shown
from selfalign.records import open_file

MAX_BYTES = 2**32
FOR_CURVES = 20_000
"""Lines of training losses that a curve needs at most."""
_NUMBER = int | float | None  # what is not finite is null in JSON
_BEGIN, _LOSS = re.compile(rb'\{"step": (\d{1,15}), '), b'"loss"'
_LINE = dict[Annotated[str, msgspec.Meta(max_length=200)], _NUMBER | str | list[_NUMBER]]
_DECODER = msgspec.json.Decoder(_LINE)
_NUMBERS = ("loss", "_norm", "_rate", "_per_second", "heldout_ema", "heldout_raw")
"""How names end whose values are read as numbers; distances, too, are (`fd_…`, `fid`)."""
_BY_TIMESTEP = tuple(f"heldout_{weights}_by_timestep" for weights in ("ema", "raw"))


class Metrics:
    """Writes `metrics.jsonl` and the trackers, from the main process only.

    A tracker that fails is left alone from then on; training goes on.

    Args:
        folder: the run's folder.
        accelerator: knows the trackers and which process is the main one.
        step: steps done; lines after it, from before an interruption, are dropped.
        monitored: whether the monitors of that step are through; if not, their lines are dropped.
        config: the run's settings, which trackers show.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        step: int,
        monitored: bool = True,
        config: RunConfig | None = None,
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._accelerator = accelerator
        self._tracks = True
        if accelerator.is_main_process:

            def belongs(line: dict[str, Any]) -> bool:
                return line["step"] < step or (
                    line["step"] == step and (monitored or "loss" in line)
                )

            def write(partial: Path) -> None:
                with partial.open("wb") as file:
                    for line in _lines(self._path):
                        begun = _BEGIN.match(line)
                        if begun and int(begun[1]) < step and line.endswith(b"}\n"):
                            file.write(line)  # of long runs there are millions
                        elif (values := _parse(line)) is not None and belongs(values):
                            file.write(_as_line(values).encode())

            write_whole(self._path, write)
        tree = {} if config is None else flatten(config_to_dict(config))
        settings = {
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"dir": str(folder), "name": folder.name, "config": tree},
        }
        self._track(lambda: accelerator.init_trackers("run", init_kwargs=settings))
        if tree:
            self._track(lambda: self._show_settings(step, tree))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record values of a step; of lists, which are by t, trackers get a curve per entry.

        Raises:
            UserError: the disk is full or not writable.
        """
        if self._accelerator.is_main_process:
            try:
                with self._path.open("a") as file:
                    file.write(_as_line({"step": step, **values}))
            except OSError as error:
                why = reason(error, self._path.parent)
                raise UserError(f"{self._path} cannot be written: {why}") from error
        numbers: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, list):
                for bin, number in enumerate(value):
                    numbers[f"{name}/{(bin + 0.5) / len(value):.2f}"] = number
            else:
                numbers[name] = value
        self._track(lambda: self._accelerator.log(numbers, step=step))

    def show_picture(self, step: int, name: str, path: Path) -> None:
        """Give trackers a picture of a step.

        Args:
            step: steps done.
            name: what it shows.
            path: its file, which Pillow can read.
        """

        def show() -> None:
            pictures = {name: np.asarray(Image.open(path).convert("RGB"))[None]}
            for tracker in self._accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(pictures, step=step, **layout)

        if self._accelerator.is_main_process and self._accelerator.trackers:
            self._track(show)

    def _show_settings(self, step: int, tree: Mapping[str, Any]) -> None:
        """As a text, where a tracker has no place for a run's settings that costs no time."""
        rows = "\n".join(f"    {name}: {shown(name, value)}" for name, value in tree.items())
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log({"config": rows}, step=step)

    def close(self) -> None:
        """Flush the trackers.

        Not by accelerate's `end_training`, which leaves the group of processes too: they end together.
        """
        for tracker in self._accelerator.trackers:
            self._track(tracker.finish)

    def _track(self, act: Callable[[], object]) -> None:
        if not self._tracks:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 – trackers are other people's code and servers
            self._tracks = False
            warnings.warn(
                f"trackers get no more values, metrics.jsonl does: {type(error).__name__}: {error}",
                stacklevel=2,
            )


def read_metrics(folder: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; those that a crash has cut off or damaged are left out.

    Args:
        folder: the run's.
        most: how many lines of training losses suffice, as they do for a curve: of more, one in so many,
            and the last. All others (held-out losses) are there.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / "metrics.jsonl"
    lines = map(_parse, _lines(path) if most is None else _thinned(path, most))
    return [line for line in lines if line is not None]


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; none where there is no file."""
    if path.exists():
        with open_file(path, MAX_BYTES) as file:
            yield from file


def _thinned(path: Path, most: int) -> Iterator[bytes]:
    """About `most` of the lines with a training loss, the last one among them, and all others."""
    stride = max(1, sum(1 for _ in _lines(path)) // most)
    last = None
    for number, line in enumerate(_lines(path)):
        last = None
        if number % stride == 0 or _LOSS not in line:
            yield line
        else:
            last = line
    if last is not None:
        yield last


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's values; None for a damaged one."""
    try:
        values = _decode(line)
        step = values["step"]
    except (ValueError, KeyError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    if not isinstance(step, int) or not 0 <= step < 2**53:
        return None
    if any(_is_of_another_kind(name, value) for name, value in values.items()):
        return None
    if "heldout_ema" in values and not values.keys() >= {"heldout_raw", *_BY_TIMESTEP}:
        return None
    return {name: _from_json(value) for name, value in values.items()}


def _decode(line: bytes) -> dict[str, Any]:
    try:
        return _DECODER.decode(line)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # Python's JSON knows NaN
        return msgspec.convert(json.loads(line), _LINE)


def _is_of_another_kind(name: str, value: object) -> bool:
    """Whether a value is not what those who read it by its name take it for."""
    if name in _BY_TIMESTEP:
        return not isinstance(value, list)
    is_number = name.endswith(_NUMBERS) or name.startswith(("fd_", "fid"))
    return is_number and isinstance(value, str | list)


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(number) for number in value]
    return math.nan if value is None else value


def _as_line(values: dict[str, Any]) -> str:
    return json.dumps(_to_json(values)) + "\n"


def _to_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {name: _to_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_to_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

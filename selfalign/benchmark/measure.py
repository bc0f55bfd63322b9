"""Measure a training step, whole and by part."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from selfalign.benchmark.limit import seconds_of, synchronize
from selfalign.config import ResolvedConfig
from selfalign.data.batch import Batch
from selfalign.network import Backbone
from selfalign.student import assemble_student
from selfalign.training.accelerator import make_accelerator
from selfalign.training.ema import EMA
from selfalign.training.step import TrainingStep, make_optimizer


@dataclass(frozen=True)
class StepTiming:
    """Seconds of a step over repetitions, and of its parts."""

    seconds: list[float]
    parts: dict[str, float]
    """student forward, teacher, backward, optimizer and EMA, rest: medians."""
    peak_memory_mb: float
    """Largest memory of the process, or of the device where there is one."""

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)


def make_model(config: ResolvedConfig, device: torch.device | str = "cpu") -> Backbone:
    """A model on a device, with small random weights: no layer is zero, so that no work is trivial.

    The numbers are drawn where they are needed, as large models take seconds to draw on a processor:
    on another device they are others.
    """
    with torch.device(device):
        model = assemble_student(config)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model.to(device)


class StepBenchmark:
    """A training step on made-up data, ready to be taken again and again.

    Args:
        config: a resolved tree; its batch size is used.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self.config = config
        self.accelerator: Accelerator = make_accelerator(config.training, Path())
        device = self.accelerator.device
        student = make_model(config, device).train()
        generator = torch.Generator().manual_seed(0)
        self.ema = EMA(student, config.training.ema_decays[0])
        optimizer = make_optimizer(config, student)
        self.take_step = TrainingStep(config, self.accelerator, student, self.ema, optimizer)
        model, batch = config.model, config.training.batch_size
        x0 = torch.randn(batch, model.channels, *model.image_size, generator=generator)
        labels = torch.randint(max(1, model.num_classes), (batch,), generator=generator)
        features = {
            name: torch.randn(batch, *shape, generator=generator)
            for target in config.used_targets().values()
            for name, shape in target.stored_shapes(config).items()
        }
        self.batch = Batch(x0, labels, features).to(device)
        self._step = 0

    def take(self) -> None:
        """Take one step, and wait for nothing."""
        self.take_step(self._step, [self.batch])
        self._step += 1

    def __call__(self) -> float:
        """Take one step and return its seconds."""
        return seconds_of(self.take, self.accelerator.device)

    def parts(self) -> dict[str, float]:
        """Take one step in pieces and return the seconds of each."""
        device, step, take_step = self.accelerator.device, self._step, self.take_step
        inner = {"student forward": 0.0, "teacher": 0.0}

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                synchronize(device)
                started = time.perf_counter()
                result = function(*args, **kwargs)
                synchronize(device)
                inner[name] += time.perf_counter() - started
                return result

            return call

        student, teacher = take_step.student, self.ema.model
        with (
            _replaced(student, "forward", timed("student forward", student.forward)),
            _replaced(teacher, "features", timed("teacher", teacher.features)),
        ):
            clock = [time.perf_counter()]
            losses = take_step.forward(step, self.batch)
            synchronize(device)
            clock.append(time.perf_counter())
            self.accelerator.backward(losses.total)
            synchronize(device)
            clock.append(time.perf_counter())
            take_step.update(step, [losses])
            synchronize(device)
            clock.append(time.perf_counter())
        self._step += 1
        return {
            **inner,
            "backward": clock[2] - clock[1],
            "optimizer and EMA": clock[3] - clock[2],
            "rest": clock[1] - clock[0] - sum(inner.values()),
        }


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)  # the class's own method shows again


def time_step(config: ResolvedConfig, repetitions: int = 9, warmup: int = 3) -> StepTiming:
    """Time a training step, whole and by part."""
    benchmark = StepBenchmark(config)
    for _ in range(warmup):
        benchmark()
    seconds = [benchmark() for _ in range(repetitions)]
    parts = {}
    if not config.training.compile:  # a compiled step has no parts to be told apart
        pieces = [benchmark.parts() for _ in range(max(3, repetitions // 2))]
        parts = {name: statistics.median(piece[name] for piece in pieces) for name in pieces[0]}
    return StepTiming(seconds, parts, peak_memory_mb(benchmark.accelerator.device))


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far: of the device if it keeps count, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would begin with what the parent process had used
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**20 if sys.platform == "darwin" else largest / 2**10

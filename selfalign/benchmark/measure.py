"""Measure a training step, and the limit that this machine sets for it."""

import gc
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from selfalign.benchmark.cost import (
    BLOCK_PASSES_FORWARD,
    CHAIN_PASSES_BACKWARD,
    FLOAT_BYTES,
    Linear,
    Rates,
    attention_parts,
    linears,
    step_cost,
)
from selfalign.config import RunConfig, group_sizes, override
from selfalign.models.linear import ONEDNN, linear_gradients, product
from selfalign.models.modulation import add_gated, modulated_norm
from selfalign.models.sit import SiT
from selfalign.training.ema import EMA
from selfalign.training.loop import make_accelerator
from selfalign.training.step import TrainingStep, make_optimizer
from selfalign.views import TokenGroups


@dataclass(frozen=True)
class Limit:
    """The least time in which this machine could take a step.

    The step's products, each timed alone at the model's own shapes, attention at the rate of those
    products, and the bytes of clipping, optimizer and EMA at the rate of memory.
    """

    gemm_flops_per_second: float
    memory_bytes_per_second: float
    seconds: float


@dataclass(frozen=True)
class PassLimit:
    """The least time of one forward pass: its operations at the rate of its products alone."""

    flops: float
    seconds: float


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


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def make_model(config: RunConfig) -> SiT:
    """A model whose zero-initialised layers are not zero, so that no work is trivial."""
    model = SiT.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


class StepBenchmark:
    """A training step on made-up data, ready to be taken again and again.

    Args:
        config: a resolved tree; its batch size is used.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.accelerator: Accelerator = make_accelerator(config.training, Path())
        device = self.accelerator.device
        student = make_model(config).to(device).train()
        generator = torch.Generator().manual_seed(0)
        self.ema = EMA(student, config.training.ema_decay)
        optimizer = make_optimizer(config.training, student)
        self.take_step = TrainingStep(config, self.accelerator, student, self.ema, optimizer)
        model, batch = config.model, config.training.batch_size
        assert model.channels is not None and model.image_size is not None
        x0 = torch.randn(batch, model.channels, *model.image_size, generator=generator)
        labels = torch.randint(max(1, model.num_classes or 0), (batch,), generator=generator)
        self.batch = (x0.to(device), labels.to(device))
        self._step = 0

    def __call__(self) -> float:
        """Take one step and return its seconds."""
        device = self.accelerator.device
        synchronize(device)
        started = time.perf_counter()
        self.take_step(self._step, [self.batch])
        synchronize(device)
        self._step += 1
        return time.perf_counter() - started

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
            losses = take_step.forward(step, *self.batch)
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


def time_step(config: RunConfig, repetitions: int = 9, warmup: int = 3) -> StepTiming:
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
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**20 if sys.platform == "darwin" else largest / 2**10


def measure_limit(
    config: RunConfig, device: torch.device | str = "cpu", repetitions: int = 9
) -> Limit:
    """Measure the limit of a step: every product of the model alone, and the memory's rate.

    Args:
        config: a resolved tree; its batch size is used.
        device: where to measure.
        repetitions: of each product; the median counts.
    """
    device = torch.device(device)
    batch = config.training.batch_size
    cost = step_cost(config, batch)
    flops = seconds = 0.0
    for layer in linears(config, batch):
        forward, weight_gradient, input_gradient = _products(layer, device)
        for count, multiply in (
            (layer.student + layer.teacher, forward),
            (layer.student, weight_gradient),
            (layer.student * layer.input_gradient, input_gradient),
        ):
            if count:
                flops += count * layer.flops
                seconds += count * _median_seconds(multiply, device, repetitions)
    rate = flops / seconds
    memory = _memory_rate(device, cost.parameters, repetitions)
    attention = cost.attention / rate
    return Limit(rate, memory, seconds + attention + cost.update_bytes / memory)


def measure_rates(
    config: RunConfig, limit: Limit, device: torch.device | str = "cpu", repetitions: int = 9
) -> Rates:
    """Measure what each kind of a step's work runs at alone, at the config's own shapes.

    Args:
        config: a resolved tree; its batch size is used.
        limit: from `measure_limit`, for the products and the memory.
        device: where to measure.
        repetitions: of each measurement; the median counts.
    """
    device = torch.device(device)
    batch, tokens = config.training.batch_size, config.model.num_tokens
    width, depth = config.model.dimensions.hidden_size, config.model.dimensions.depth
    student, teacher = attention_parts(config, batch)
    attention = depth * _attention_seconds(config, student, True, device, repetitions)
    if config.alignment.target != "none":
        blocks = config.alignment.teacher_block or 0
        attention += blocks * _attention_seconds(config, teacher, False, device, repetitions)
    passes = BLOCK_PASSES_FORWARD + CHAIN_PASSES_BACKWARD
    chain = _elementwise_seconds(config, device, repetitions)
    return Rates(
        products=limit.gemm_flops_per_second,
        attention=step_cost(config, batch).attention / attention,
        elementwise=FLOAT_BYTES * passes * batch * tokens * width / chain,
        memory=limit.memory_bytes_per_second,
    )


def _attention_seconds(
    config: RunConfig, lengths: list[int], backward: bool, device: torch.device, repetitions: int
) -> float:
    """One block's attention within sequences of these lengths."""
    heads = config.model.dimensions.heads
    features = config.model.dimensions.hidden_size // heads
    total = 0.0
    for length, count in Counter(lengths).items():
        shape = (count, heads, length, features)
        q, k, v = (torch.randn(shape, device=device, requires_grad=backward) for _ in range(3))
        gradient = torch.randn(shape, device=device)

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v, grad: Tensor = gradient) -> None:
            out = functional.scaled_dot_product_attention(q, k, v)
            if backward:
                torch.autograd.grad(out, (q, k, v), grad)

        total += _median_seconds(attend, device, repetitions)
    return total


def _elementwise_seconds(config: RunConfig, device: torch.device, repetitions: int) -> float:
    """One block's norms, modulations, gates and GELU, forward and backward."""
    batch, tokens, width = (
        config.training.batch_size,
        config.model.num_tokens,
        config.model.dimensions.hidden_size,
    )
    groups = TokenGroups(None, group_sizes(config.views.mask_ratios, tokens))

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    x, update, hidden = (
        leaf(batch, tokens, width),
        leaf(batch, tokens, width),
        leaf(batch, tokens, 4 * width),
    )
    shift, scale, gate = (leaf(batch, config.num_groups, width) for _ in range(3))
    gradient, hidden_gradient = torch.randn_like(x), torch.randn_like(hidden)

    def half() -> None:
        outputs = (modulated_norm(x, shift, scale, groups), add_gated(x, gate, update, groups))
        torch.autograd.grad(outputs, (x, shift, scale, gate, update), (gradient, gradient))

    def gelu() -> None:
        torch.autograd.grad(functional.gelu(hidden, approximate="tanh"), hidden, hidden_gradient)

    return 2 * _median_seconds(half, device, repetitions) + _median_seconds(
        gelu, device, repetitions
    )


def measure_pass_limit(
    config: RunConfig, batch_size: int, device: torch.device | str = "cpu", repetitions: int = 9
) -> PassLimit:
    """Measure the limit of one sampling pass of whole images: its products, and attention.

    Args:
        config: a resolved tree.
        batch_size: images per pass, doubled already where guidance doubles them.
        device: where to measure.
        repetitions: of each product; the median counts.
    """
    device = torch.device(device)
    plain = override(config, {"alignment.target": "none", "alignment.teacher_groups": False})
    whole = {"views.timesteps": "single", "views.attention": "full", "views.mask_ratios": (1.0,)}
    config = override(plain, {**whole, "views.whole_image_fraction": 0.0})
    products = seconds = 0.0
    for layer in linears(config, batch_size):
        forward, _, _ = _products(layer, device)
        products += layer.student * layer.flops
        seconds += layer.student * _median_seconds(forward, device, repetitions)
    flops = step_cost(config, batch_size).student_forward
    return PassLimit(flops, flops * seconds / products)


def _products(layer: Linear, device: torch.device) -> tuple[Callable[[], Tensor], ...]:
    """A layer's forward product, and those for the gradients of its weight and its input."""
    x = torch.randn(layer.rows, layer.inputs, device=device)
    weight = torch.randn(layer.outputs, layer.inputs, device=device)
    bias = torch.randn(layer.outputs, device=device)
    grad = torch.randn(layer.rows, layer.outputs, device=device)
    if ONEDNN and device.type == "cpu":
        return (
            lambda: product(x, weight, bias),
            lambda: linear_gradients(grad, x),
            lambda: product(grad, weight.t()),
        )
    return lambda: torch.addmm(bias, x, weight.t()), lambda: grad.t() @ x, lambda: grad @ weight


def _median_seconds(function: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    for _ in range(2):
        function()
    seconds = []
    for _ in range(repetitions):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _memory_rate(device: torch.device, parameters: int, repetitions: int) -> float:
    """Bytes per second of x ← x + y over as many numbers as the optimizer goes through."""
    count = max(parameters, 2**20)
    x, y = torch.zeros(count, device=device), torch.zeros(count, device=device)
    seconds = _median_seconds(lambda: x.add_(y), device, repetitions)
    del x, y
    gc.collect()
    return 12 * count / seconds

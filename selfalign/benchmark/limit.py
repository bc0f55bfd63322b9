"""The least time in which a machine could take a step or a sampling pass, measured on that machine."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfalign import ops
from selfalign.benchmark.cost import (
    BLOCK_PASSES_BACKWARD,
    BLOCK_PASSES_FORWARD,
    FLOAT_BYTES,
    MetaStep,
    Rates,
    step_cost,
)
from selfalign.config import ResolvedConfig, override, resolve, whole_images
from selfalign.ops.cpu.matmul import ONEDNN, linear_gradients
from selfalign.ops.cpu.matmul import linear as multiply
from selfalign.targets.ema import EMATarget
from selfalign.tokens import TokenGroups, one_group


@dataclass(frozen=True)
class Limit:
    """The least time in which this machine could take a step.

    The step's matmuls without anything between them, attention's operations at the rate of those
    matmuls, and the bytes of clipping, optimizer and EMA at the rate of memory.
    """

    gemm_flops_per_second: float
    memory_bytes_per_second: float
    seconds: float


@dataclass(frozen=True)
class PassLimit:
    """The least time of one forward pass: its operations at the rate of its matmuls alone."""

    flops: float
    seconds: float


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a device takes for what a function tells it."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Matmul:
    """A matrix product a·b of a step, with what its operands are stored in, so that they can be shared."""

    kind: Literal["forward", "input gradient", "weight gradient"]
    a: tuple[int, torch.Size]
    """Which storage, and its shape as a matrix: an input, or a gradient."""
    b: tuple[int, torch.Size]
    """A weight (outputs, inputs), or the input of a layer."""

    @property
    def flops(self) -> int:
        """Operations."""
        (rows, columns), other = self.a[1], self.b[1]
        inner = other[1] if self.kind != "forward" else other[0]
        return 2 * rows * columns * inner


class _Recorder(TorchDispatchMode):
    """Notes the matmuls of linear layers, in their order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.matmuls: list[Matmul] = []
        self._seen: list[Tensor] = []  # kept, so that no two storages of a step share an address

    def _operand(self, matrix: Tensor) -> tuple[int, torch.Size]:
        self._seen.append(matrix)
        return matrix.untyped_storage()._cdata, matrix.shape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.addmm.default:
            _, a, b = args
            self.matmuls.append(Matmul("forward", self._operand(a), self._operand(b.t())))
        elif func is torch.ops.aten.mm.default:
            a, b = args
            if a.is_contiguous():
                self.matmuls.append(Matmul("input gradient", self._operand(a), self._operand(b)))
            else:
                matmul = Matmul("weight gradient", self._operand(a.t()), self._operand(b))
                self.matmuls.append(matmul)
        return func(*args, **(kwargs or {}))


class Matmuls:
    """All matmuls of a step's linear layers in the step's order, on operands of their own.

    As in a step, every operand comes from memory: a matmul that is timed again and again finds them in the
    cache, which no step does. The objective itself says which there are, on the meta device.

    Args:
        config: a resolved tree.
        batch_size: samples on the device.
        device: where.
        backward: whether the matmuls of the backward pass belong to it.
        plain: multiply as `torch.nn.Linear` does, and not as the model does.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        batch_size: int,
        device: torch.device | str = "cpu",
        backward: bool = True,
        plain: bool = False,
    ) -> None:
        self.device = torch.device(device)
        step = MetaStep(config, batch_size)
        with _Recorder() as recorder:
            losses = step.forward()
            if backward:
                losses.total.backward()
        self.flops = sum(matmul.flops for matmul in recorder.matmuls)
        own = not plain and self.device.type == "cpu" and ONEDNN and ops.compiled()
        operands: dict[tuple[int, torch.Size], Tensor] = {}

        def operand(described: tuple[int, torch.Size]) -> Tensor:
            if described not in operands:
                operands[described] = torch.randn(described[1], device=self.device)
            return operands[described]

        self._calls = [
            _call(matmul.kind, operand(matmul.a), operand(matmul.b), own)
            for matmul in recorder.matmuls
        ]

    def __call__(self) -> float:
        """Multiply everything once and return the seconds. Results are kept until the end, as a step's."""
        results: list[object] = []
        return seconds_of(lambda: results.extend(call() for call in self._calls), self.device)


def _call(kind: str, a: Tensor, b: Tensor, own: bool) -> Callable[[], object]:
    if kind == "forward":
        bias = a.new_zeros(len(b))
        return lambda: multiply(a, b, bias) if own else torch.addmm(bias, a, b.t())
    if kind == "input gradient":
        return lambda: multiply(a, b.t(), None) if own else a @ b
    return lambda: linear_gradients(a, b) if own else a.t() @ b


class StepLimit:
    """The limit of a step, to be measured in turn with the step itself. Arguments as for `Matmuls`."""

    def __init__(
        self, config: ResolvedConfig, device: torch.device | str = "cpu", plain: bool = False
    ) -> None:
        self._cost = step_cost(config, config.training.batch_size)
        self._matmuls = Matmuls(config, config.training.batch_size, device, plain=plain)

    def __call__(self) -> Limit:
        """Measure it once."""
        seconds = self._matmuls()
        rate = self._matmuls.flops / seconds
        memory = _memory_rate(self._matmuls.device, self._cost.parameters)
        seconds += self._cost.attention / rate + self._cost.update_bytes / memory
        return Limit(rate, memory, seconds)


def measure_limit(
    config: ResolvedConfig, device: torch.device | str = "cpu", repetitions: int = 9
) -> Limit:
    """Measure the limit of a step several times, and return the median.

    Args:
        config: a resolved tree; its batch size is used.
        device: where to measure.
        repetitions: how often, after a warm-up.
    """
    measure = StepLimit(config, device)
    measure()
    limits = sorted((measure() for _ in range(repetitions)), key=lambda limit: limit.seconds)
    return limits[repetitions // 2]


def measure_pass_limit(
    config: ResolvedConfig,
    batch_size: int,
    device: torch.device | str = "cpu",
    repetitions: int = 9,
) -> PassLimit:
    """Measure the limit of one sampling pass of whole images: its matmuls, and attention.

    Args:
        config: a resolved tree.
        batch_size: images per pass, doubled already where guidance doubles them.
        device: where to measure.
        repetitions: how often, after a warm-up; the median counts.
    """
    whole = {
        "terms.alignment.target": "none",
        "objective.terms": (),
        "views.timesteps": "single",
        "views.attention": "full",
        "views.mask_ratios": (1.0,),
        "views.whole_image_fraction": 0.0,
    }
    config = resolve(override(config, whole))
    matmuls = Matmuls(config, batch_size, device, backward=False)
    matmuls()
    seconds = statistics.median(matmuls() for _ in range(repetitions))
    flops = step_cost(config, batch_size).student_forward
    return PassLimit(flops, flops * seconds / matmuls.flops)


def measure_rates(
    config: ResolvedConfig, limit: Limit, device: torch.device | str = "cpu", repetitions: int = 9
) -> Rates:
    """Measure what each kind of a step's work runs at alone, at the config's own shapes.

    Args:
        config: a resolved tree; its batch size is used.
        limit: from `measure_limit`, for the matmuls and the memory.
        device: where to measure.
        repetitions: of each measurement; the median counts.
    """
    device = torch.device(device)
    batch, tokens = config.training.batch_size, config.model.num_tokens
    student = MetaStep(config, 1).student
    width, depth = student.hidden_size, len(student.blocks)
    heads: int = student.get_submodule("blocks.0.attn").heads  # type: ignore[assignment]
    whole = whole_images(config.views.whole_image_fraction, batch)
    separate = config.views.attention == "separated"
    groups = TokenGroups(None, config.group_sizes, whole=whole, separate=separate)
    teacher = config.used_targets().get("ema")
    shape = (batch, tokens, width)
    attention = depth * _attention_seconds(shape, heads, groups, True, device, repetitions)
    if isinstance(teacher, EMATarget):
        seen = groups if teacher.groups else one_group(tokens)
        blocks = student.block_of(teacher.tap(config))
        attention += blocks * _attention_seconds(shape, heads, seen, False, device, repetitions)
    passes = BLOCK_PASSES_FORWARD + BLOCK_PASSES_BACKWARD
    chain = _elementwise_seconds(shape, config.group_sizes, device, repetitions)
    return Rates(
        matmuls=limit.gemm_flops_per_second,
        attention=step_cost(config, batch).attention / attention,
        elementwise=FLOAT_BYTES * passes * batch * tokens * width / chain,
        memory=limit.memory_bytes_per_second,
    )


def _attention_seconds(
    shape: tuple[int, int, int],
    heads: int,
    groups: TokenGroups,
    backward: bool,
    device: torch.device,
    repetitions: int,
) -> float:
    """One block's attention on tokens (B, N, D), from q, k and v to the input of the projection."""
    batch, tokens, width = shape
    parts = groups.attention_parts(batch)
    operands = _several(
        lambda: (
            torch.randn(batch, tokens, 3 * width, device=device, requires_grad=backward),
            torch.randn(shape, device=device),
        )
    )

    def attend() -> None:
        qkv, gradient = next(operands)
        out = ops.attention(qkv, heads, parts)
        if backward:
            torch.autograd.grad(out, qkv, gradient)

    return _median_seconds(attend, device, repetitions)


def _elementwise_seconds(
    shape: tuple[int, int, int], sizes: tuple[int, ...], device: torch.device, repetitions: int
) -> float:
    """One block's norms, modulations, gates and GELU on tokens (B, N, D), forward and backward."""
    batch, tokens, width = shape

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    shift, scale, gate = (leaf(batch, len(sizes), width) for _ in range(3))
    features = _several(lambda: (leaf(*shape), leaf(*shape), torch.randn(shape, device=device)))
    hidden = _several(
        lambda: (
            leaf(batch, tokens, 4 * width),
            torch.randn(batch, tokens, 4 * width, device=device),
        )
    )

    def half() -> None:
        x, update, gradient = next(features)
        total = ops.gated_residual(x, gate, update, sizes)
        outputs = (ops.modulated_norm(total, shift, scale, sizes), total)
        torch.autograd.grad(outputs, (x, shift, scale, gate, update), (gradient, gradient))

    def activation() -> None:
        x, gradient = next(hidden)
        torch.autograd.grad(ops.gelu(x), x, gradient)

    return 2 * _median_seconds(half, device, repetitions) + _median_seconds(
        activation, device, repetitions
    )


def _several(
    make: Callable[[], tuple[Tensor, ...]], count: int = 8
) -> Iterator[tuple[Tensor, ...]]:
    """Operands in turn, so that each comes from memory when it is needed, as in a step."""
    made = [make() for _ in range(count)]
    while True:
        yield from made


def _median_seconds(
    function: Callable[[], object], device: torch.device, repetitions: int
) -> float:
    for _ in range(2):
        function()
    return statistics.median(seconds_of(function, device) for _ in range(repetitions))


def _memory_rate(device: torch.device, parameters: int) -> float:
    """Bytes per second of x ← x + y over as many numbers as the optimizer goes through."""
    count = max(parameters, 2**20)
    x, y = torch.zeros(count, device=device), torch.zeros(count, device=device)
    seconds = _median_seconds(lambda: x.add_(y), device, repetitions=3)
    del x, y
    gc.collect()
    return 12 * count / seconds

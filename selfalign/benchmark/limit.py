"""The least time in which a machine could take a step or a sampling pass, measured on that machine."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from selfalign.benchmark.cost import (
    BLOCK_PASSES_BACKWARD,
    BLOCK_PASSES_FORWARD,
    FLOAT_BYTES,
    Linear,
    Rates,
    linears,
    step_cost,
)
from selfalign.config import RunConfig, group_sizes, override, whole_images
from selfalign.models.attention import Attention
from selfalign.models.linear import ONEDNN, gelu_, linear_gradients, product
from selfalign.models.modulation import ResidualStream
from selfalign.views import TokenGroups


@dataclass(frozen=True)
class Limit:
    """The least time in which this machine could take a step.

    The step's products without anything between them, attention's operations at the rate of those
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


class Products:
    """All matrix products of a step's linear layers in the step's order, on operands of their own.

    As in a step, every operand comes from memory: a product that is timed again and again finds them in
    the cache, which no step does.

    Args:
        config: a resolved tree.
        batch_size: samples on the device.
        device: where.
        backward: whether the products of the backward pass belong to it.
        plain: multiply as `torch.nn.Linear` does, and not as the model does.
    """

    def __init__(
        self,
        config: RunConfig,
        batch_size: int,
        device: torch.device | str = "cpu",
        backward: bool = True,
        plain: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.flops = 0.0
        self._calls: list[Callable[[], object]] = []
        layers = list(linears(config, batch_size))
        own = ONEDNN and self.device.type == "cpu" and not plain
        operands = {layer: self._operands(layer) for layer in layers}
        for layer, i in _in_turn(layers, lambda layer: layer.student):
            self._add(layer, _forward(operands[layer][i], own))
        for layer, i in _in_turn(layers, lambda layer: layer.teacher):
            self._add(layer, _forward(operands[layer][i], own))
        for layer, i in reversed(_in_turn(layers, lambda layer: layer.student)):
            x, weight, _, grad = operands[layer][i]
            if backward and layer.input_gradient:
                self._add(layer, _input_gradient(grad, weight, own))
            if backward:
                self._add(layer, _weight_gradient(grad, x, own))

    def _operands(self, layer: Linear) -> list[tuple[Tensor, ...]]:
        """Input, weight, bias and the output's gradient, once for every layer of the model."""
        shapes = (
            (layer.rows, layer.inputs),
            (layer.outputs, layer.inputs),
            (layer.outputs,),
            (layer.rows, layer.outputs),
        )
        return [
            tuple(torch.randn(shape, device=self.device) for shape in shapes)
            for _ in range(max(layer.student, layer.teacher))
        ]

    def _add(self, layer: Linear, call: Callable[[], object]) -> None:
        self.flops += layer.flops
        self._calls.append(call)

    def __call__(self) -> float:
        """Multiply everything once and return the seconds. Results are kept until the end, as a step's."""
        results: list[object] = []
        return seconds_of(lambda: results.extend(call() for call in self._calls), self.device)


def _in_turn(layers: list[Linear], count: Callable[[Linear], int]) -> list[tuple[Linear, int]]:
    """The layers of the first block, of the second block, and so on."""
    deepest = max(map(count, layers))
    return [(layer, i) for i in range(deepest) for layer in layers if i < count(layer)]


def _forward(operands: tuple[Tensor, ...], own: bool) -> Callable[[], object]:
    x, weight, bias, _ = operands
    if own:
        return lambda: product(x, weight, bias)
    return lambda: torch.addmm(bias, x, weight.t())


def _input_gradient(grad: Tensor, weight: Tensor, own: bool) -> Callable[[], object]:
    return (lambda: product(grad, weight.t())) if own else (lambda: grad @ weight)


def _weight_gradient(grad: Tensor, x: Tensor, own: bool) -> Callable[[], object]:
    return (lambda: linear_gradients(grad, x)) if own else (lambda: grad.t() @ x)


class StepLimit:
    """The limit of a step, to be measured in turn with the step itself. Arguments as for `Products`."""

    def __init__(
        self, config: RunConfig, device: torch.device | str = "cpu", plain: bool = False
    ) -> None:
        self._cost = step_cost(config, config.training.batch_size)
        self._products = Products(config, config.training.batch_size, device, plain=plain)

    def __call__(self) -> Limit:
        """Measure it once."""
        seconds = self._products()
        rate = self._products.flops / seconds
        memory = _memory_rate(self._products.device, self._cost.parameters)
        seconds += self._cost.attention / rate + self._cost.update_bytes / memory
        return Limit(rate, memory, seconds)


def measure_limit(
    config: RunConfig, device: torch.device | str = "cpu", repetitions: int = 9
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
    config: RunConfig, batch_size: int, device: torch.device | str = "cpu", repetitions: int = 9
) -> PassLimit:
    """Measure the limit of one sampling pass of whole images: its products, and attention.

    Args:
        config: a resolved tree.
        batch_size: images per pass, doubled already where guidance doubles them.
        device: where to measure.
        repetitions: how often, after a warm-up; the median counts.
    """
    plain = override(config, {"alignment.target": "none", "alignment.teacher_groups": False})
    whole = {"views.timesteps": "single", "views.attention": "full", "views.mask_ratios": (1.0,)}
    config = override(plain, {**whole, "views.whole_image_fraction": 0.0})
    products = Products(config, batch_size, device, backward=False)
    products()
    seconds = statistics.median(products() for _ in range(repetitions))
    flops = step_cost(config, batch_size).student_forward
    return PassLimit(flops, flops * seconds / products.flops)


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
    sizes = group_sizes(config.views.mask_ratios, tokens)
    whole = whole_images(config.views.whole_image_fraction, batch)
    separate = config.views.attention == "separated"
    groups = TokenGroups(None, sizes, whole=whole, separate=separate)
    everything = TokenGroups(None, (tokens,))
    attention = depth * _attention_seconds(config, groups, True, device, repetitions)
    if config.alignment.target != "none":
        seen = groups if config.alignment.teacher_groups else everything
        blocks = config.alignment.teacher_block or 0
        attention += blocks * _attention_seconds(config, seen, False, device, repetitions)
    passes = BLOCK_PASSES_FORWARD + BLOCK_PASSES_BACKWARD
    chain = _elementwise_seconds(config, groups, device, repetitions)
    return Rates(
        products=limit.gemm_flops_per_second,
        attention=step_cost(config, batch).attention / attention,
        elementwise=FLOAT_BYTES * passes * batch * tokens * width / chain,
        memory=limit.memory_bytes_per_second,
    )


def _attention_seconds(
    config: RunConfig, groups: TokenGroups, backward: bool, device: torch.device, repetitions: int
) -> float:
    """One block's attention, from q, k and v to the input of the projection."""
    width = config.model.dimensions.hidden_size
    module = Attention(width, config.model.dimensions.heads).to(device)
    shape = (config.training.batch_size, config.model.num_tokens)
    operands = _several(
        lambda: (
            torch.randn(*shape, 3 * width, device=device, requires_grad=backward),
            torch.randn(*shape, width, device=device),
        )
    )

    def attend() -> None:
        qkv, gradient = next(operands)
        out = module.attend(qkv, groups)
        if backward:
            torch.autograd.grad(out, qkv, gradient)

    return _median_seconds(attend, device, repetitions)


def _elementwise_seconds(
    config: RunConfig, groups: TokenGroups, device: torch.device, repetitions: int
) -> float:
    """One block's norms, modulations, gates and GELU, forward and backward."""
    width = config.model.dimensions.hidden_size
    shape = (config.training.batch_size, config.model.num_tokens, width)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    shift, scale, gate = (leaf(shape[0], len(groups.sizes), width) for _ in range(3))
    tokens = _several(lambda: (leaf(*shape), leaf(*shape), torch.randn(shape, device=device)))
    hidden = _several(lambda: (leaf(*shape[:2], 4 * width), leaf(*shape[:2], 4 * width)))

    def half() -> None:
        x, update, gradient = next(tokens)
        stream = ResidualStream(x, groups)
        stream.add(gate, update)
        outputs = (stream.norm(shift, scale), stream.x)
        torch.autograd.grad(outputs, (x, shift, scale, gate, update), (gradient, gradient))

    def activation() -> None:
        x, gradient = next(hidden)
        torch.autograd.grad(gelu_(x), x, gradient.detach())

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

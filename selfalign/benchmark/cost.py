"""The cost of a training step, counted on the meta device: parameters, arithmetic, memory, bytes.

The step that is counted is the objective itself, run on tensors without numbers. A multiplication and an
addition count as two operations; matmuls and attention count, all else is left to the measurements.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from selfalign.config import ResolvedConfig
from selfalign.network import Backbone
from selfalign.objective import Losses, Objective
from selfalign.randomness import make_generator
from selfalign.student import build_student
from selfalign.training.ema import EMA
from selfalign.views import Draw, draw_views

FLOAT_BYTES = 4
UPDATE_BYTES_PER_PARAMETER = {
    "gradient norm": FLOAT_BYTES,  # read
    "clipping": 2 * FLOAT_BYTES,  # gradient read and written
    "AdamW": 7 * FLOAT_BYTES,  # weight, gradient, two moments read; all but the gradient written
    "EMA": 3 * FLOAT_BYTES,  # weight and average read, average written
}
# Features of one token that a block reads and writes, besides matmuls and attention, where every chain of
# operations is one pass (ops/cpu/cpu.cpp, or what a compiler makes of them).
BLOCK_PASSES_FORWARD = 16
"""Two norms and two gated sums (8), GELU over the hidden layer (8)."""
BLOCK_PASSES_BACKWARD = 24
"""Two norms and two gated sums (12), GELU (12)."""
RECOMPUTED = 0.5
"""Share of its forward operations that fused attention does again in the backward pass: QKᵀ."""


@dataclass(frozen=True)
class Rates:
    """How fast a device does the four kinds of work of a step."""

    matmuls: float
    """Operations per second, of linear layers."""
    attention: float
    """Operations per second."""
    elementwise: float
    """Bytes per second, of norms, modulation, gates and GELU."""
    memory: float
    """Bytes per second, of clipping, optimizer and EMA."""


@dataclass(frozen=True)
class Cost:
    """A step's cost on one device."""

    parameters: int
    student_forward: float
    """Operations of the student's forward pass, heads included."""
    teacher_forward: float
    """Operations of what the targets need besides, the EMA teacher's pass for one."""
    backward: float
    """Operations of the backward pass."""
    attention: float
    """Of all of these, the operations of attention itself."""
    elementwise_bytes: int
    """Bytes moved between the matmuls: norms, modulation, gates, GELU and their gradients."""
    update_bytes: int
    """Bytes moved by clipping, optimizer and EMA."""
    state_bytes: int
    """Weights, gradients, two moments and the averages, in float32."""
    activation_bytes: int
    """What the forward pass keeps for the backward pass, in float32."""
    teacher_share: float = 0.0
    """Share of the blocks that the teacher runs."""

    @property
    def flops(self) -> float:
        """Operations of the step."""
        return self.student_forward + self.teacher_forward + self.backward

    def seconds(self, rates: Rates) -> float:
        """Time of the step: each kind of work at its own rate, one after the other."""
        return (
            (self.flops - self.attention) / rates.matmuls
            + self.attention / rates.attention
            + self.elementwise_bytes / rates.elementwise
            + self.update_bytes / rates.memory
        )


class MetaStep:
    """A step's objective on the meta device: everything but the numbers.

    Args:
        config: a resolved tree.
        batch_size: samples on the device.
    """

    def __init__(self, config: ResolvedConfig, batch_size: int) -> None:
        self.config, self.batch_size = config, batch_size
        with torch.device("meta"):
            self.student = build_student(config)
            self.teacher = EMA(self.student, decay=0.0).model
        shape = (batch_size, config.model.channels, *config.model.image_size)
        self._draw = _on_meta(
            draw_views(config, (1, *shape[1:]), make_generator(0, "cost")), batch_size
        )
        self._x0 = torch.empty(shape, device="meta")
        self._condition = torch.zeros(batch_size, dtype=torch.int64, device="meta")
        self._stored = {
            name: torch.empty(batch_size, *shape, device="meta")
            for target in config.used_targets().values()
            for name, shape in target.stored_shapes(config).items()
        }
        self._objective = Objective(config)

    def forward(self, student: Callable[..., Any] | None = None) -> Losses:
        """The losses; `student` may be a wrapper of the student."""
        arguments = (self.teacher, self._x0, self._condition, self._draw)
        return self._objective(student or self.student, *arguments, stored=self._stored)


def _on_meta(draw: Draw, batch_size: int) -> Draw:
    """A draw of one sample as one of many, without the numbers."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: move(held) for name, held in value.items()}
        if not isinstance(value, Tensor):
            return value
        return torch.empty((batch_size, *value.shape[1:]), dtype=value.dtype, device="meta")

    values = {entry.name: move(getattr(draw, entry.name)) for entry in dataclasses.fields(draw)}
    return Draw(**values)


def step_cost(config: ResolvedConfig, batch_size: int) -> Cost:
    """Count a training step.

    Args:
        config: a resolved tree.
        batch_size: samples on one device.
    """
    step = MetaStep(config, batch_size)
    counter = FlopCounterMode(display=False)

    def so_far() -> tuple[int, int]:
        """Operations in all, and those of attention, whose matmuls are the only batched ones."""
        counts = counter.get_flop_counts().get("Global", {})
        return counter.get_total_flops(), counts.get(torch.ops.aten.bmm, 0)

    student = [(0, 0)]

    def counted(*arguments: Any) -> Any:
        before = so_far()
        output = step.student(*arguments)
        student[0] = tuple(b - a for a, b in zip(before, so_far(), strict=True))  # type: ignore[assignment]
        return output

    with (
        _block_calls(step.student) as student_blocks,
        _block_calls(step.teacher) as teacher_blocks,
        counter,
    ):
        losses = step.forward(counted)
        forward = so_far()
        blocks_forward = len(student_blocks)
        losses.total.backward()
        everything = so_far()
    student_flops, student_attention = student[0]
    again = RECOMPUTED * student_attention
    parameters = sum(parameter.numel() for parameter in step.student.parameters())
    further = len(config.training.ema_decays) - 1
    tokens, width = batch_size * config.model.num_tokens, step.student.hidden_size
    passes = BLOCK_PASSES_FORWARD * (len(student_blocks) + len(teacher_blocks))
    passes += BLOCK_PASSES_BACKWARD * blocks_forward
    return Cost(
        parameters=parameters,
        student_forward=student_flops,
        teacher_forward=forward[0] - student_flops,
        backward=everything[0] - forward[0] + again,
        attention=everything[1] + again,
        elementwise_bytes=FLOAT_BYTES * passes * tokens * width,
        update_bytes=parameters
        * (sum(UPDATE_BYTES_PER_PARAMETER.values()) + further * UPDATE_BYTES_PER_PARAMETER["EMA"]),
        state_bytes=(5 + further) * FLOAT_BYTES * parameters,
        activation_bytes=FLOAT_BYTES * _kept_features(config, step.student) * tokens * width,
        teacher_share=len(teacher_blocks) / len(step.student.blocks),
    )


@contextmanager
def _block_calls(backbone: Backbone) -> Iterator[list[None]]:
    """A list that grows with every block that is run, recomputed ones included."""
    calls: list[None] = []
    handles = [
        block.register_forward_pre_hook(lambda module, inputs: calls.append(None))
        for block in backbone.blocks
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _kept_features(config: ResolvedConfig, student: Backbone) -> int:
    """What autograd keeps, in units of one token's features.

    A block keeps: its input and both norms' outputs and modulated outputs (5), q, k, v (3), the
    attention's output (1), the projection's (1), the sum after it (1), the hidden layer before and
    after GELU (8) and the MLP's output (1). A head keeps its hidden layer before and after SiLU and both
    sets of features (6).
    """
    block, depth = 20, len(student.blocks)
    blocks = block * depth
    if config.model.gradient_checkpointing:
        # Inputs, all of the block that is at work, and what is not recomputed.
        kept = {"blocks": 0.0, "alternate": 0.5 * (block - 1)}
        blocks = depth + block + int(kept[config.model.checkpointing] * depth)
    return blocks + 4 + 6 * len(student.head_taps)

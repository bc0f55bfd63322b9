"""The cost of a training step, counted from the config: parameters, arithmetic, memory, bytes.

A multiplication and an addition count as two operations; matrix products and attention count, all else
is left to the measurements. A backward pass computes two products for each of the forward's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from selfalign.config import RunConfig, group_sizes, whole_images

FLOAT_BYTES = 4
UPDATE_BYTES_PER_PARAMETER = {
    "gradient norm": FLOAT_BYTES,  # read
    "clipping": 2 * FLOAT_BYTES,  # gradient read and written
    "AdamW": 7 * FLOAT_BYTES,  # weight, gradient, two moments read; all but the gradient written
    "EMA": 3 * FLOAT_BYTES,  # weight and average read, average written
}
# Features of one token that a block reads and writes, besides products and attention, where every chain
# of operations is one pass (kernels/cpu.cpp, or what a compiler makes of them).
BLOCK_PASSES_FORWARD = 16
"""Two gated sums with their norms (4 each), GELU over the hidden layer (8)."""
BLOCK_PASSES_BACKWARD = 24
"""Two norms with their gated sums (6 each), GELU (12)."""
ATTENTION_BACKWARD = 2.5
"""Products in the backward pass of fused attention, which recomputes QKᵀ, per forward product."""


@dataclass(frozen=True)
class Linear:
    """Matrix products of one kind of linear layer in one step."""

    name: str
    rows: int
    """Rows of the input: samples × tokens, or samples × groups."""
    inputs: int
    outputs: int
    student: int
    """How many such layers the student runs, forward and backward."""
    teacher: int = 0
    """How many the teacher runs, forward only."""
    input_gradient: bool = True
    """Whether the backward pass needs the gradient of the input."""

    @property
    def flops(self) -> int:
        """Operations of one forward product."""
        return 2 * self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class Rates:
    """How fast a device does the four kinds of work of a step."""

    products: float
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
    """Operations of the student's forward pass."""
    teacher_forward: float
    """Operations of the teacher's forward pass, up to its block."""
    backward: float
    """Operations of the backward pass."""
    attention: float
    """Of all of these, the operations of attention itself."""
    elementwise_bytes: int
    """Bytes moved between the products: norms, modulation, gates, GELU and their gradients."""
    update_bytes: int
    """Bytes moved by clipping, optimizer and EMA."""
    state_bytes: int
    """Weights, gradients, two moments and the average, in float32."""
    activation_bytes: int
    """What the forward pass keeps for the backward pass, in float32."""

    @property
    def flops(self) -> float:
        """Operations of the step."""
        return self.student_forward + self.teacher_forward + self.backward

    def seconds(self, rates: Rates) -> float:
        """Time of the step: each kind of work at its own rate, one after the other."""
        return (
            (self.flops - self.attention) / rates.products
            + self.attention / rates.attention
            + self.elementwise_bytes / rates.elementwise
            + self.update_bytes / rates.memory
        )


def linears(config: RunConfig, batch_size: int) -> Iterator[Linear]:
    """Every kind of linear layer that one device runs in a step.

    Args:
        config: a resolved tree.
        batch_size: samples on the device.
    """
    model, alignment = config.model, config.alignment
    assert model.channels is not None
    width, depth = model.dimensions.hidden_size, model.dimensions.depth
    tokens, groups = batch_size * model.num_tokens, batch_size * config.num_groups
    aligned = alignment.target != "none"
    blocks = (alignment.teacher_block or 0) if aligned else 0
    teacher_groups = groups if alignment.teacher_groups else batch_size
    patch = model.channels * model.patch_size**2
    teacher = int(aligned)
    yield Linear("x_embedder", tokens, patch, width, 1, teacher, input_gradient=False)
    yield Linear("qkv", tokens, width, 3 * width, depth, blocks)
    yield Linear("proj", tokens, width, width, depth, blocks)
    yield Linear("fc1", tokens, width, 4 * width, depth, blocks)
    yield Linear("fc2", tokens, 4 * width, width, depth, blocks)
    yield Linear("adaLN", groups, width, 6 * width, depth)
    if blocks:
        yield Linear("adaLN of the teacher", teacher_groups, width, 6 * width, 0, blocks)
    yield Linear("final adaLN", groups, width, 2 * width, 1)
    yield Linear("final linear", tokens, width, patch, 1)
    yield Linear("t_embedder.0", groups, 256, width, 1, input_gradient=False)
    yield Linear("t_embedder.2", groups, width, width, 1)
    if aligned:
        yield Linear("t_embedder.0 of the teacher", teacher_groups, 256, width, 0, 1)
        yield Linear("t_embedder.2 of the teacher", teacher_groups, width, width, 0, 1)
        yield Linear("ap_head.linear1", tokens, width, 2 * width, 1)
        yield Linear("ap_head.linear2", tokens, 2 * width, width, 1)


def attention_parts(config: RunConfig, batch_size: int) -> tuple[list[int], list[int]]:
    """Lengths of the sequences that attend among themselves, of student and teacher, in one block."""
    tokens = config.model.num_tokens
    whole = whole_images(config.views.whole_image_fraction, batch_size)
    everything = [tokens] * batch_size
    if config.views.attention == "full":
        return everything, everything
    sizes = list(group_sizes(config.views.mask_ratios, tokens))
    separated = [tokens] * whole + sizes * (batch_size - whole)
    return separated, separated if config.alignment.teacher_groups else everything


def attention_flops(lengths: list[int], width: int) -> float:
    """Operations of QKᵀ and of the product with V, over all heads."""
    return sum(4.0 * length**2 * width for length in lengths)


def count_parameters(config: RunConfig) -> int:
    """Trained parameters of the model."""
    model = config.model
    assert model.channels is not None and model.num_classes is not None
    width, depth = model.dimensions.hidden_size, model.dimensions.depth
    patch = model.channels * model.patch_size**2

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    block = (
        linear(width, 3 * width)
        + linear(width, width)
        + linear(width, 4 * width)
        + linear(4 * width, width)
        + linear(width, 6 * width)
    )
    if model.qk_norm:
        block += 4 * width // model.dimensions.heads
    total = depth * block + linear(patch, width) + linear(256, width) + linear(width, width)
    total += linear(width, 2 * width) + linear(width, patch)
    if model.num_classes:
        total += (model.num_classes + 1) * width
    if config.alignment.target != "none":
        total += linear(width, 2 * width) + linear(2 * width, width)
    return total


def step_cost(config: RunConfig, batch_size: int) -> Cost:
    """Count a training step.

    Args:
        config: a resolved tree.
        batch_size: samples on one device.
    """
    model, alignment = config.model, config.alignment
    width, depth = model.dimensions.hidden_size, model.dimensions.depth
    aligned = alignment.target != "none"
    student = teacher = backward = 0.0
    for layer in linears(config, batch_size):
        student += layer.student * layer.flops
        teacher += layer.teacher * layer.flops
        backward += layer.student * layer.flops * (2 if layer.input_gradient else 1)
    student_lengths, teacher_lengths = attention_parts(config, batch_size)
    own = depth * attention_flops(student_lengths, width)
    teachers = 0.0
    if aligned:
        teachers = (alignment.teacher_block or 0) * attention_flops(teacher_lengths, width)
    if model.gradient_checkpointing:
        backward += student + own
    parameters = count_parameters(config)
    passes = depth * (BLOCK_PASSES_FORWARD + BLOCK_PASSES_BACKWARD)
    if aligned:
        passes += (alignment.teacher_block or 0) * BLOCK_PASSES_FORWARD
    if model.gradient_checkpointing:
        passes += depth * BLOCK_PASSES_FORWARD
    return Cost(
        parameters=parameters,
        student_forward=student + own,
        teacher_forward=teacher + teachers,
        backward=backward + ATTENTION_BACKWARD * own,
        attention=own * (1 + ATTENTION_BACKWARD) + teachers,
        elementwise_bytes=FLOAT_BYTES * passes * batch_size * model.num_tokens * width,
        update_bytes=parameters * sum(UPDATE_BYTES_PER_PARAMETER.values()),
        state_bytes=5 * FLOAT_BYTES * parameters,
        activation_bytes=_activation_bytes(config, batch_size),
    )


def _activation_bytes(config: RunConfig, batch_size: int) -> int:
    """Tensors that autograd keeps, in units of one token's features.

    A block keeps: its input and both norms' outputs and modulated outputs (5), q, k, v (3), the
    attention's output (1), the projection's (1), the sum after it (1), the hidden layer before and
    after GELU (8) and the MLP's output (1).
    """
    model = config.model
    tokens, width = batch_size * model.num_tokens, model.dimensions.hidden_size
    per_block = 20 if not model.gradient_checkpointing else 1
    units = per_block * model.dimensions.depth + 4
    if config.alignment.target != "none":
        units += 6  # the head's hidden layer before and after SiLU, and both sets of features
    if model.gradient_checkpointing:
        units += 20  # the block that is being recomputed
    return FLOAT_BYTES * units * tokens * width

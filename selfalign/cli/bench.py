"""`selfalign bench`: what a step or a sample costs, measured here or estimated for elsewhere."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from selfalign.cli.console import console, parse
from selfalign.cli.tree import options_of, restore
from selfalign.config import ResolvedConfig, resolve
from selfalign.errors import UserError
from selfalign.recipes import recipe
from selfalign.sampling.settings import SamplingConfig
from selfalign.sections import MAX_BATCH

PAPERS_SAMPLING = SamplingConfig("sde", 250, 1.8, (0.0, 0.7))


@dataclass(frozen=True)
class Model:
    """The transformer."""

    size: str = "S/2"
    """Size and patch: tiny, S, B, L, XL, 2B, 5B or 10B, then /1, /2, /4 or /8."""


@dataclass(frozen=True)
class Data:
    """Made-up data."""

    shape: tuple[int, int, int] = (4, 32, 32)
    """Channels, height and width of an input."""


@dataclass(frozen=True)
class BenchArguments:
    """What is measured."""

    recipe: str = "sra-dts-as"
    """Name of the recipe."""
    model: Model = dataclasses.field(default_factory=Model)
    data: Data = dataclasses.field(default_factory=Data)
    batch_size: int = 8
    """Images per step, or per batch of samples."""
    repetitions: int = 9
    """How often it is measured, after a warm-up."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class StepArguments(BenchArguments):
    """Measure a training step."""

    compile: bool = False
    """Compile the objective with torch.compile."""


@dataclass(frozen=True)
class SampleArguments(BenchArguments):
    """Measure sampling."""

    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: options_of(PAPERS_SAMPLING)
    )


@dataclass(frozen=True)
class EstimateArguments(BenchArguments):
    """Estimate a training step."""

    devices: int = 1
    """Devices that share the batch."""
    nodes: int = 1
    """Machines that they are in, as many in each."""
    sharding: Literal["none", "gradients", "full"] = "none"
    """What devices hold, as --training.sharding."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """In what weights are gathered and activations kept, as --training.precision."""
    gradient_accumulation: int = 1
    """Micro-batches per step and device."""
    gradient_checkpointing: bool = False
    """Whether blocks are recomputed in the backward pass."""
    device_tflops: float = 0.2
    """Rate of the model's matmuls on one device, in 10^12 operations per second."""
    attention_tflops: float | None = None
    """Rate of its attention, in 10^12 operations per second; left out: that of the matmuls."""
    device_bandwidth: float = 25.0
    """Rate of one device's memory, in 10^9 bytes per second."""
    node_bandwidth: float = 450.0
    """From one device to the others of its node, in 10^9 bytes per second."""
    network_bandwidth: float = 400.0
    """From one node to the others, over all of its adapters, in 10^9 bytes per second."""
    overlap: float = 0.9
    """Share of forward and backward pass behind which devices can send."""
    efficiency: float = 0.9
    """Predicted over measured time: stands for all that the model leaves out (benchmarks/step.md)."""


def bench_command(arguments: Sequence[str]) -> int:
    """`selfalign bench`."""
    kinds = {"step": _step, "sample": _sample, "estimate": _estimate}
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(
            "usage: selfalign bench step|sample|estimate --recipe R --model.size S/2 "
            "--data.shape C H W --batch-size B [--json]\n\n"
            "  step      measure a training step, by part, beside the limit of this machine\n"
            "  sample    measure sampling\n"
            "  estimate  count a training step and predict its time on other devices\n\n"
            "example: selfalign bench step --model.size S/2 --data.shape 4 32 32 --batch-size 8"
        )
        return 0
    if arguments[0] not in kinds:
        raise UserError(f"bench is {arguments[0]!r}: allowed are {', '.join(kinds)}")
    return kinds[arguments[0]](arguments[1:])


def _config(
    arguments: BenchArguments, batch_size: int, more: Mapping[str, Any] | None = None
) -> ResolvedConfig:
    for name, value in (
        ("batch-size", arguments.batch_size),
        ("repetitions", arguments.repetitions),
    ):
        if not 1 <= value <= MAX_BATCH:
            raise UserError(f"--{name} is {value}: allowed is a number from 1 to {MAX_BATCH:,}")
    channels, height, width = arguments.data.shape
    settings = {
        "model.size": arguments.model.size,
        "training.batch_size": batch_size,
        "training.trackers": (),
        **(more or {}),
    }
    return resolve(recipe(arguments.recipe, settings), channels, (height, width), 1000)


def _what(arguments: BenchArguments) -> dict[str, object]:
    return {
        "recipe": arguments.recipe,
        "model_size": arguments.model.size,
        "data_shape": list(arguments.data.shape),
        "batch_size": arguments.batch_size,
    }


def _step(words: Sequence[str]) -> int:
    """Heavy imports come after the options have been read, here and below."""
    parsed = parse(
        StepArguments,
        words,
        "selfalign bench step",
        "Measure a training step, by part, beside the limit of this machine. Example: selfalign bench "
        "step --recipe sra-dts-as --model.size S/2 --data.shape 4 32 32 --batch-size 8",
    )

    from selfalign import ops
    from selfalign.benchmark.cost import step_cost
    from selfalign.benchmark.limit import measure_limit
    from selfalign.benchmark.measure import time_step
    from selfalign.processes import open_accelerator

    config = _config(parsed, parsed.batch_size, {"training.compile": parsed.compile})
    timing = time_step(config, parsed.repetitions)
    limit = measure_limit(config, open_accelerator().device)
    cost = step_cost(config, parsed.batch_size)
    _show(
        parsed.json,
        {
            **_what(parsed),
            "cpu_kernels": ops.compiled(),
            "parameters": cost.parameters,
            "seconds_per_step": timing.median,
            "seconds_per_step_range": [min(timing.seconds), max(timing.seconds)],
            "flops_per_step": cost.flops,
            "peak_flops_share": cost.flops / timing.median / limit.gemm_flops_per_second,
            "gemm_flops_per_second": limit.gemm_flops_per_second,
            "limit_seconds": limit.seconds,
            "limit_share": limit.seconds / timing.median,
            "peak_memory_mb": timing.peak_memory_mb,
            "seconds_by_part": timing.parts,
        },
    )
    return 0


def _sample(words: Sequence[str]) -> int:
    parsed = parse(
        SampleArguments,
        words,
        "selfalign bench sample",
        "Measure sampling. Example: selfalign bench sample --model.size S/2 --data.shape 4 32 32 "
        "--batch-size 4 --solver sde --steps 250 --guidance-scale 1.8 --guidance-interval 0 0.7",
    )
    from selfalign import ops
    from selfalign.benchmark.measure import peak_memory_mb
    from selfalign.benchmark.sampling import time_sampling
    from selfalign.processes import open_accelerator

    config, sampling = _config(parsed, parsed.batch_size), restore(parsed.sampling, PAPERS_SAMPLING)
    device = open_accelerator().device
    timing = time_sampling(config, sampling, parsed.batch_size, device, parsed.repetitions)
    _show(
        parsed.json,
        {
            **_what(parsed),
            "cpu_kernels": ops.compiled(),
            "solver": sampling.solver,
            "steps": sampling.steps,
            "images_per_second": parsed.batch_size / timing.median,
            "seconds_per_batch": timing.median,
            "seconds_per_batch_range": [min(timing.seconds), max(timing.seconds)],
            "passes_per_image": timing.passes,
            "flops_per_batch": timing.flops,
            "peak_flops_share": timing.flops / timing.median / timing.gemm_flops_per_second,
            "gemm_flops_per_second": timing.gemm_flops_per_second,
            "limit_seconds": timing.limit_seconds,
            "limit_share": timing.limit_seconds / timing.median,
            "peak_memory_mb": peak_memory_mb(device),
        },
    )
    return 0


def _estimate(words: Sequence[str]) -> int:
    parsed = parse(
        EstimateArguments,
        words,
        "selfalign bench estimate",
        "Count a training step and predict its time. Example: selfalign bench estimate --model.size "
        "XL/2 --recipe sra-dts-as --data.shape 4 64 64 --batch-size 256 --devices 8 --device-tflops 300 "
        "--device-bandwidth 2000 --efficiency 0.4",
    )
    for name in (
        *("devices", "nodes", "gradient_accumulation", "device_tflops", "attention_tflops"),
        *("device_bandwidth", "node_bandwidth", "network_bandwidth", "efficiency"),
    ):
        if (value := getattr(parsed, name)) is not None and not 0 < value < math.inf:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {value}: allowed is a finite number above 0")
    if not 0 <= parsed.overlap <= 1:
        raise UserError(f"--overlap is {parsed.overlap}: allowed is a share from 0 to 1")
    if parsed.devices % parsed.nodes:
        raise UserError(
            f"--devices is {parsed.devices}: must be a multiple of --nodes {parsed.nodes}"
        )
    shares = parsed.devices * parsed.gradient_accumulation
    if parsed.batch_size % shares:
        raise UserError(
            f"--batch-size is {parsed.batch_size}: must be a multiple of --devices {parsed.devices}"
            + f" × --gradient-accumulation {parsed.gradient_accumulation}"
            * (shares > parsed.devices)
        )
    from selfalign.benchmark.cluster import Cluster, cluster_cost
    from selfalign.benchmark.cost import FLOAT_BYTES, Rates, step_cost

    config = _config(
        parsed,
        parsed.batch_size,
        {"model.gradient_checkpointing": parsed.gradient_checkpointing},
    )
    cost = step_cost(config, parsed.batch_size // parsed.devices)
    # What falls short of the rates takes longer, and what is sent then hides behind more of it.
    tera, giga = 1e12 * parsed.efficiency, 1e9 * parsed.efficiency
    rates = Rates(
        matmuls=parsed.device_tflops * tera,
        attention=(parsed.attention_tflops or parsed.device_tflops) * tera,
        elementwise=parsed.device_bandwidth * giga,
        memory=parsed.device_bandwidth * giga,
    )
    number_bytes = FLOAT_BYTES if parsed.precision == "fp32" else 2
    cluster = Cluster(
        devices=parsed.devices,
        nodes=parsed.nodes,
        sharding=parsed.sharding,
        weight_bytes=number_bytes,
        node_bandwidth=parsed.node_bandwidth * 1e9,
        network_bandwidth=parsed.network_bandwidth * 1e9,
        overlap=parsed.overlap,
    )
    found = cluster_cost(cost, rates, cluster, config.depth, parsed.gradient_accumulation)
    activations = cost.activation_bytes * number_bytes / FLOAT_BYTES
    _show(
        parsed.json,
        {
            **_what(parsed),
            "devices": parsed.devices,
            "nodes": parsed.nodes,
            "sharding": parsed.sharding,
            "parameters": cost.parameters,
            "flops_per_step": cost.flops * parsed.devices,
            "flops_by_part": {
                "student forward": cost.student_forward * parsed.devices,
                "teacher": cost.teacher_forward * parsed.devices,
                "backward": cost.backward * parsed.devices,
                "of these, attention": cost.attention * parsed.devices,
            },
            "state_gib_per_device": found.state_bytes / 2**30,
            "activation_gib_per_device": activations / parsed.gradient_accumulation / 2**30,
            "sent_gib_per_device": {
                "weights": found.gather_bytes / 2**30,
                "gradients": found.reduce_bytes / 2**30,
            },
            "communication_seconds": found.communication_seconds,
            "exposed_communication_seconds": found.exposed_seconds,
            "seconds_per_step": found.seconds,
        },
    )
    return 0


def _show(as_json: bool, values: dict[str, object]) -> None:
    if as_json:
        print(json.dumps(values))
        return
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        if isinstance(value, dict):
            for part, amount in value.items():
                table.add_row(f"  {name.replace('_', ' ')}: {part}", f"{amount:.4g}")
        elif isinstance(value, list):
            table.add_row(name.replace("_", " "), " ".join(f"{item:.4g}" for item in value))
        else:
            table.add_row(
                name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else f"{value}"
            )
    console.print(table)

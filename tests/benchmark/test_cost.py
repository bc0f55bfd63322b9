"""The count of operations against torch's own counter, and its memory and parameters."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import RECIPE_NAMES
from torch.utils.flop_counter import FlopCounterMode

from selfalign import build_student, recipe, resolve
from selfalign.benchmark.cost import Rates, step_cost
from selfalign.benchmark.limit import measure_limit, measure_rates
from selfalign.benchmark.measure import StepBenchmark
from selfalign.benchmark.sampling import count_passes, time_sampling
from selfalign.config import whole_images
from selfalign.sampling.settings import SamplingConfig

MIXED = {"views.whole_image_fraction": 0.25, "views.mask_ratios": (0.2, 0.3, 0.5)}


def small(name: str, overrides: dict[str, Any]) -> Any:
    """A resolved tree with 16 tokens, batch 8."""
    settings = {"model.size": "tiny/2", "training.batch_size": 8, "training.trackers": ()}
    return resolve(recipe(name, {**settings, **overrides}), 4, (8, 8), 10)


def closed_form(config: Any, batch: int) -> dict[str, float]:
    """The cost of a step of a SiT by hand, as a second description of the model.

    Linear layers are (rows, inputs, outputs, of the student, of the teacher, gradient of the input).
    """
    model, student = config.model, build_student(config)
    width, depth, channels = student.hidden_size, len(student.blocks), model.channels
    aligned = "alignment" in config.used_terms()
    ema = config.targets["ema"]
    blocks = student.block_of(ema.tap(config)) if aligned else 0
    tokens, groups = batch * model.num_tokens, batch * config.num_groups
    teacher_groups, patch = groups if ema.groups else batch, channels * model.patch_size**2
    layers = [
        (tokens, patch, width, 1, aligned, False),  # x_embedder
        (tokens, width, 3 * width, depth, blocks, True),  # qkv
        (tokens, width, width, depth, blocks, True),  # proj
        (tokens, width, 4 * width, depth, blocks, True),  # fc1
        (tokens, 4 * width, width, depth, blocks, True),  # fc2
        (groups, width, 6 * width, depth, 0, True),  # adaLN
        (teacher_groups, width, 6 * width, 0, blocks, True),
        (groups, width, 2 * width, 1, 0, True),  # final layer
        (tokens, width, patch, 1, 0, True),
        (groups, 256, width, 1, 0, False),  # t_embedder
        (groups, width, width, 1, 0, True),
        (teacher_groups, 256, width, 0, aligned, True),
        (teacher_groups, width, width, 0, aligned, True),
        (tokens, width, 2 * width, aligned, 0, True),  # ap_head
        (tokens, 2 * width, width, aligned, 0, True),
    ]
    forward = sum(2 * n * a * b * own for n, a, b, own, _, _ in layers)
    teacher = sum(2 * n * a * b * theirs for n, a, b, _, theirs, _ in layers)
    backward = sum(2 * n * a * b * own * (1 + grad) for n, a, b, own, _, grad in layers)
    whole = whole_images(config.views.whole_image_fraction, batch)
    everything = [model.num_tokens] * batch
    separated = [model.num_tokens] * whole + [*config.group_sizes] * (batch - whole)
    lengths = separated if config.views.attention == "separated" else everything

    def attention(lengths: list[int]) -> float:
        return sum(4.0 * length**2 * width for length in lengths)

    own = depth * attention(lengths)
    theirs = blocks * attention(lengths if ema.groups else everything)
    return {
        "student_forward": forward + own,
        "teacher_forward": teacher + theirs,
        "backward": backward + 2.5 * own,  # fused attention computes QKᵀ again
        "attention": 3.5 * own + theirs,
    }


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in RECIPE_NAMES),
    ("sra-dts-as", MIXED),
    ("sra", {"model.qk_norm": True}),
]


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_operations_are_the_closed_forms(name: str, overrides: dict[str, Any]) -> None:
    config = small(name, overrides)
    cost = step_cost(config, 8)
    for part, value in closed_form(config, 8).items():
        assert getattr(cost, part) == pytest.approx(value, rel=1e-12)
    assert cost.parameters == sum(p.numel() for p in build_student(config).parameters())


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_operations_are_those_of_a_real_step(name: str, overrides: dict[str, Any]) -> None:
    config = small(name, overrides)
    benchmark = StepBenchmark(config)
    with FlopCounterMode(display=False) as counter:
        benchmark()
    counts = counter.get_flop_counts()["Global"]
    matmuls = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
    counted = sum(value for op, value in counts.items() if op in matmuls)
    cost = step_cost(config, 8)
    assert cost.flops - cost.attention == pytest.approx(counted, rel=1e-9)


def test_checkpointing_runs_the_blocks_again_and_nothing_else() -> None:
    plain, again = (
        step_cost(small("sra-dts-as", {"model.gradient_checkpointing": on}), 8)
        for on in (False, True)
    )
    width, tokens, groups, depth = 96, 8 * 16, 8 * 2, 6
    linear = 2 * depth * width * (12 * width * tokens + 6 * width * groups)
    attention = depth * 8 * 4.0 * (4**2 + 12**2) * width
    assert again.backward - plain.backward == pytest.approx(linear + attention)
    assert again.attention - plain.attention == pytest.approx(attention)
    assert again.student_forward == plain.student_forward
    assert again.activation_bytes < plain.activation_bytes


def test_separation_saves_exactly_the_attention_between_groups() -> None:
    full, separated = small("sra-dts", {}), small("sra-dts-as", {})
    a, b = step_cost(full, 8), step_cost(separated, 8)
    assert a.flops - b.flops == pytest.approx(a.attention - b.attention)
    # Groups of 4 and 12 of 16 tokens: (16 + 144) / 256.
    assert b.attention / a.attention == pytest.approx(160 / 256)


def test_time_is_the_sum_of_four_kinds_of_work() -> None:
    cost = step_cost(small("sra-dts-as", {}), 8)
    work = {
        "matmuls": cost.flops - cost.attention,
        "attention": cost.attention,
        "elementwise": float(cost.elementwise_bytes),
        "memory": float(cost.update_bytes),
    }
    rates = Rates(**work)  # so that each kind takes a second
    assert cost.seconds(rates) == pytest.approx(4)
    for name in work:
        slower = replace(rates, **{name: getattr(rates, name) / 3})
        assert cost.seconds(slower) == pytest.approx(6)


def test_the_limit_and_the_passes_of_sampling() -> None:
    config = small("sra-dts-as", {})
    limit = measure_limit(config, repetitions=3)
    rates = measure_rates(config, limit, repetitions=3)
    assert rates.matmuls == limit.gemm_flops_per_second
    assert rates.attention > 1e6 and rates.elementwise > 1e6
    assert limit.seconds > 0
    assert limit.gemm_flops_per_second > 1e8
    assert limit.memory_bytes_per_second > 1e8
    guided = SamplingConfig("sde", 10, guidance_scale=2.0, guidance_interval=(0.0, 0.5))
    unguided, doubled = count_passes(guided)
    assert (unguided, doubled) == (5, 5)
    assert count_passes(SamplingConfig("heun", 4)) == (7, 0)
    timing = time_sampling(small("sit", {}), guided, 2, repetitions=2)
    assert timing.passes == 15
    assert timing.median > 0
    assert timing.limit_seconds > 0
    assert timing.flops == pytest.approx(15 * step_cost(small("sit", {}), 2).student_forward)

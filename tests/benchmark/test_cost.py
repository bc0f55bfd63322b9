"""The count of operations against torch's own counter, and its memory and parameters."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import RECIPE_NAMES
from torch.utils.flop_counter import FlopCounterMode

from selfalign import SiT, recipe, resolve
from selfalign.benchmark.cost import Rates, count_parameters, linears, step_cost
from selfalign.benchmark.limit import measure_limit, measure_rates
from selfalign.benchmark.measure import StepBenchmark
from selfalign.benchmark.sampling import count_passes, time_sampling
from selfalign.models import linear
from selfalign.sampling.generate import SamplingConfig

MIXED = {"views.whole_image_fraction": 0.25, "views.mask_ratios": (0.2, 0.3, 0.5)}


def small(name: str, overrides: dict[str, Any]) -> Any:
    """A resolved tree with 16 tokens, batch 8."""
    settings = {"model.size": "tiny/2", "training.batch_size": 8, "training.trackers": ()}
    return resolve(recipe(name, {**settings, **overrides}), 4, (8, 8), 10)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [(name, {}) for name in RECIPE_NAMES]
    + [("sra-dts-as", MIXED), ("sra", {"model.qk_norm": True})],
)
def test_products_are_what_torch_counts(
    name: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "ONEDNN", False)  # torch's counter does not know oneDNN's products
    config = small(name, overrides)
    benchmark = StepBenchmark(config)
    with FlopCounterMode(display=False) as counter:
        benchmark()
    counts = counter.get_flop_counts()["Global"]
    products = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
    counted = sum(value for op, value in counts.items() if op in products)
    cost = step_cost(config, 8)
    assert cost.flops - cost.attention == pytest.approx(counted, rel=1e-9)
    parts = sum(
        layer.flops * (layer.student * (2 + layer.input_gradient) + layer.teacher)
        for layer in linears(config, 8)
    )
    assert parts == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("size", ["tiny/2", "S/2", "B/4"])
@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("name", ["sit", "sra-dts-as"])
def test_parameters_are_the_models(size: str, classes: int, name: str) -> None:
    settings = {"model.size": size, "model.qk_norm": name == "sit"}
    config = resolve(recipe(name, settings), 3, (16, 16), classes)
    model = SiT.from_config(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


def test_separation_saves_exactly_the_attention_between_groups() -> None:
    full, separated = small("sra-dts", {}), small("sra-dts-as", {})
    a, b = step_cost(full, 8), step_cost(separated, 8)
    assert a.flops - b.flops == pytest.approx(a.attention - b.attention)
    # Groups of 4 and 12 of 16 tokens: (16 + 144) / 256.
    assert b.attention / a.attention == pytest.approx(160 / 256)


def test_time_is_the_sum_of_four_kinds_of_work() -> None:
    cost = step_cost(small("sra-dts-as", {}), 8)
    work = {
        "products": cost.flops - cost.attention,
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
    assert rates.products == limit.gemm_flops_per_second
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

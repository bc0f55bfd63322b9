"""The training step against its limit and against the reference; see step.md.

    python benchmarks/step.py            everything, about 20 minutes on two cores
    python benchmarks/step.py 256        one of the parts below

Both sides alternate in one run; figures are medians of at least seven pairs after warm-up.
"""

import dataclasses
import functools
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import write_shards
from reference import reference_sde
from sides import ReferenceStep, alternate, make_config, spread

from selfalign import ResolvedConfig
from selfalign.benchmark.cost import step_cost
from selfalign.benchmark.limit import StepLimit, measure_limit, measure_rates
from selfalign.benchmark.measure import StepBenchmark, make_model, peak_memory_mb
from selfalign.benchmark.sampling import measure_sampling_limit
from selfalign.data.datasets import open_data
from selfalign.data.source import Split
from selfalign.data.stream import training_batches
from selfalign.sampling.generate import generate
from selfalign.sampling.settings import SamplingConfig
from selfalign.sections import DataConfig

PAIRS = 15
FOLDER = Path(__file__).parent


def against_limit(config: ResolvedConfig, step: StepBenchmark) -> dict[str, Any]:
    """Share of the limit: the matmuls alone, and the step, in turn; the same with torch's matmuls."""
    flops = step_cost(config, config.training.batch_size).flops
    results: dict[str, Any] = {"flops_per_step": flops}
    for plain, name in ((False, "limit"), (True, "limit_of_torch")):
        measure, rates = StepLimit(config, plain=plain), []
        step(), step(), measure()
        shares, seconds = [], []
        for _ in range(2 * PAIRS):
            limit, taken = measure(), step()
            shares.append(limit.seconds / taken)
            seconds.append(taken)
            rates.append(limit.gemm_flops_per_second / 1e9)
        results |= {
            f"share_of_{name}": spread(shares),
            f"gemm_gflops_of_{name}": spread(rates),
            f"seconds_per_step_beside_{name}": spread(seconds),
        }
    return results


def tokens_256() -> dict[str, Any]:
    """SiT-S/2, 4×32×32, batch 8: share of the limit, and against the reference."""
    return _against_both(make_config("sra-dts-as", "S/2", 4, 32, 8))


def tokens_1024() -> dict[str, Any]:
    """SiT-S/2, 4×64×64, batch 2: the same, and what each side allocates."""
    config = make_config("sra-dts-as", "S/2", 4, 64, 2)
    result = _against_both(config)
    memory = {side: _step_memory(side, 64, 2) for side in ("product", "reference")}
    result["step_mib"] = {side: round(used["step_mib"]) for side, used in memory.items()}
    result["memory_ratio"] = memory["product"]["step_mib"] / memory["reference"]["step_mib"]
    return result


def _against_both(config: ResolvedConfig) -> dict[str, Any]:
    product = StepBenchmark(config)
    reference = ReferenceStep(config, product)
    own, other = alternate(product, reference, PAIRS)
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    del reference
    gc.collect()
    return {
        **against_limit(config, product),
        "speed_against_reference": spread(ratios),
        "reference_seconds": spread(other),
    }


def tokens_4096() -> dict[str, Any]:
    """SiT-S/2, 4×128×128, batch 1: the memory of a process that takes two steps."""
    used = _step_memory("product", 128, 1)
    config = make_config("sra-dts-as", "S/2", 4, 128, 1)
    heads, depth = config.model.dimensions.heads, config.model.dimensions.depth
    # Per block: scores, masked scores and softmax of every head, kept for the backward pass (the
    # masked scores are freed), besides the mask; activations as in the cost model.
    matrices = 2 * 4 * 4096**2 * heads * depth
    reference = matrices + step_cost(config, 1).activation_bytes + step_cost(config, 1).state_bytes
    return {
        "process_gib": round(used["peak_mib"] / 1024, 2),
        "seconds_per_step": round(used["seconds"], 2),
        "reference_gib_computed_at_least": round(reference / 2**30, 1),
    }


def _step_memory(side: str, image_side: int, batch: int) -> dict[str, float]:
    """Memory of a fresh process that takes two steps of one side."""
    code = f"import step; step.report_memory({side!r}, {image_side}, {batch})"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=FOLDER
    )
    return json.loads(out.stdout.splitlines()[-1])


def report_memory(side: str, image_side: int, batch: int) -> None:
    """Print the largest memory of two steps, and what a step needs beyond weights and states."""
    config = make_config("sra-dts-as", "S/2", 4, image_side, batch)
    step = StepBenchmark(config) if side == "product" else ReferenceStep(config)
    small = make_config("sra-dts-as", "S/2", 4, 4, 1)
    # A step on four tokens makes optimizer state and gradients, so that only activations are added.
    warm = StepBenchmark(small) if side == "product" else ReferenceStep(small)
    warm()
    del warm
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    sizes = peak_of_allocations(profiler)
    seconds = step()
    peak = peak_memory_mb(torch.device("cpu"))
    # The first step also makes two moments and the gradients, which are states.
    states = 3 * 4 * step_cost(config, batch).parameters / 2**20
    print(json.dumps({"peak_mib": peak, "step_mib": sizes / 2**20 - states, "seconds": seconds}))


def peak_of_allocations(profiler: torch.profiler.profile) -> float:
    """Largest sum of bytes that were allocated and not yet freed, from the profiler's events."""
    total = peak = 0.0
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def separation() -> dict[str, Any]:
    """sra-dts-as against self-flow, 1024 tokens: separation must make training cheaper."""
    separated = StepBenchmark(make_config("sra-dts-as", "S/2", 4, 64, 2))
    full = StepBenchmark(make_config("self-flow", "S/2", 4, 64, 2))
    own, other = alternate(separated, full, PAIRS)
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return {"cost_of_separated_over_full": spread(ratios)}


def tiny() -> dict[str, Any]:
    """The demo's step: tiny/1 on digits, batch 64."""
    config = make_config("sra-dts-as", "tiny", 1, 8, 64)
    step = StepBenchmark(config)
    limits = against_limit(config, step)
    pieces = [step.parts() for _ in range(15)]
    parts = {name: statistics.median(piece[name] for piece in pieces) for name in pieces[0]}
    return {
        **limits,
        "milliseconds_by_part": {name: round(1e3 * s, 2) for name, s in parts.items()},
    }


def growth() -> dict[str, Any]:
    """Step time over tokens and groups, beside the count of operations."""
    rows: dict[str, Any] = {"tokens": {}, "groups": {}}
    for name, value, config in growth_configs():
        rows[name][value] = _time_and_count(config)
    rates, errors = fit_rates([point for points in rows.values() for point in points.values()])
    plot_growth(rows, rates, FOLDER / "growth.png")
    return {
        **rows,
        "gflops_per_second": dict(zip(TERMS, rates.tolist(), strict=True)),
        "model_over_measured": spread(errors.tolist()),
    }


def growth_configs() -> Iterator[tuple[str, int, ResolvedConfig]]:
    """What is varied, its value, and the tree."""
    for side, batch in ((16, 16), (32, 4), (64, 1), (128, 1)):
        config = make_config("sra-dts-as", "S/2", 4, side, batch)
        yield "tokens", config.model.num_tokens, config
    for groups in (1, 2, 3, 4, 8):
        name = "sra-dts-as" if groups > 1 else "sra"
        config = make_config(name, "S/2", 4, 64, 1, **{"views.mask_ratios": (1.0,) * groups})
        yield "groups", groups, config


TERMS = ("products", "attention")


def _time_and_count(config: ResolvedConfig) -> dict[str, float]:
    step = StepBenchmark(config)
    step()
    batch = config.training.batch_size
    seconds = statistics.median(step() for _ in range(5)) / batch
    return {"seconds_per_image": seconds, **count(config)}


def count(config: ResolvedConfig) -> dict[str, float]:
    """10^9 operations of a step per image, by term."""
    batch = config.training.batch_size
    cost = step_cost(config, batch)
    products = cost.flops - cost.attention
    return dict(zip(TERMS, (products / batch / 1e9, cost.attention / batch / 1e9), strict=True))


def fit_rates(points: list[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """One rate per term that explains all times, and the model's time over each measured one."""
    counts = np.array([[point[term] for term in TERMS] for point in points])
    relative = counts / np.array([[point["seconds_per_image"]] for point in points])
    seconds = np.linalg.lstsq(relative, np.ones(len(points)), rcond=None)[0]
    return 1 / seconds, relative @ seconds


def plot_growth(rows: dict[str, Any], rates: np.ndarray, path: Path) -> None:
    """Measured seconds per image beside the count of operations at one rate per term."""
    from matplotlib.figure import Figure

    label = "operations: " + ", ".join(
        f"{term} at {rate:.0f} GFLOP/s" for term, rate in zip(TERMS, rates, strict=True)
    )
    figure = Figure(figsize=(9, 3.4), dpi=144, layout="constrained")
    for axis, (name, points) in zip(figure.subplots(1, 2), rows.items(), strict=True):
        x = list(points)
        seconds = [point["seconds_per_image"] for point in points.values()]
        counts = np.array([[point[term] for term in TERMS] for point in points.values()])
        axis.plot(x, seconds, marker="o", label="measured")
        axis.plot(x, counts @ (1 / rates), "--", label=label)
        if name == "tokens":
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
        axis.set(xlabel=name, ylabel="seconds per image")
        axis.set_ylim(bottom=0 if name == "groups" else None)
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    figure.savefig(path)


def compiled() -> dict[str, Any]:
    """torch.compile against eager, alternating, after compilation."""
    results = {}
    for label, config in (
        ("tiny on digits", make_config("sra-dts-as", "tiny", 1, 8, 64)),
        ("S/2, 256 tokens", make_config("sra-dts-as", "S/2", 4, 32, 8)),
    ):
        torch._dynamo.utils.counters.clear()  # they count from the start of the process
        eager = StepBenchmark(config)
        training = dataclasses.replace(config.training, compile=True)
        fast = StepBenchmark(dataclasses.replace(config, training=training))
        own, other = alternate(fast, eager, PAIRS, warmup=3)
        graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        ratios = [b / a for a, b in zip(own, other, strict=True)]
        results[label] = {"speed_against_eager": spread(ratios), "graphs": graphs}
    return results


def sampling() -> dict[str, Any]:
    """SDE sampling, S/2, 256 tokens, batch 4, guided for t <= 0.7, against the reference and its limit.

    Ten steps stand for 250: all steps cost the same, and the guided share of the steps is the same.
    """
    config = make_config("sit", "S/2", 4, 32, 4)
    settings = SamplingConfig("sde", 10, 1.8, (0.0, 0.7))
    model = make_model(config).eval().requires_grad_(False)
    reference = ReferenceStep(config).student.eval().requires_grad_(False)
    reference.load_state_dict(model.state_dict(), strict=False)
    noise, labels = torch.randn(4, 4, 32, 32), torch.arange(4)

    def own() -> float:
        started = time.perf_counter()
        list(generate(model, config.flow.path, settings, 4, batch_size=4))
        return time.perf_counter() - started

    def other() -> float:
        started = time.perf_counter()
        interval, scale = settings.guidance_interval, settings.guidance_scale
        drawn = functools.partial(torch.randn_like, noise)
        reference_sde(
            reference, noise, labels, 10, settings.steps, scale, interval, lambda step: drawn()
        )
        return time.perf_counter() - started

    mine, theirs = alternate(own, other, PAIRS, warmup=1)
    shares = []
    for _ in range(PAIRS):
        limit, _ = measure_sampling_limit(config, settings, 4, repetitions=3)
        shares.append(limit / own())
    return {
        "speed_against_reference": spread([b / a for a, b in zip(mine, theirs, strict=True)]),
        "share_of_limit": spread(shares),
        "images_per_second_of_250_steps": spread([4 / (25 * s) for s in mine]),
    }


def estimate() -> dict[str, Any]:
    """The cost model's time beside the measured one, for six sizes and patches."""
    results = {}
    for size, channels, side, batch in (
        ("tiny", 1, 8, 64),
        ("S/2", 4, 32, 8),
        ("B/2", 4, 32, 4),
        ("B/4", 4, 32, 8),
        ("L/2", 4, 32, 2),
        ("L/8", 4, 32, 16),
    ):
        config = make_config("sra-dts-as", size, channels, side, batch)
        step = StepBenchmark(config)
        step()
        limit = measure_limit(config, repetitions=5)
        measured = [step() for _ in range(PAIRS)]
        cost = step_cost(config, batch)
        rates = measure_rates(config, limit, repetitions=5)
        predicted = cost.seconds(rates)
        results[size] = {
            "predicted_seconds": predicted,
            "measured_seconds": spread(measured),
            "predicted_over_measured": predicted / statistics.median(measured),
            **{f"{name}_g_per_second": rate / 1e9 for name, rate in vars(rates).items()},
        }
        del step
        gc.collect()
    return results


def loader() -> dict[str, Any]:
    """Images per second of training's loader, beside what the steps of `tiny` and S/2 consume."""
    digits = open_data(DataConfig(name="digits")).train
    step = StepBenchmark(make_config("sra-dts-as", "tiny", 1, 8, 64))
    small = StepBenchmark(make_config("sra-dts-as", "S/2", 4, 32, 8))
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "shards", 20_000)
        latents = open_data(DataConfig(name="latents", root=f"{folder}/shards")).train
        results = {}
        for name, split, batch, take_step in (
            ("digits, tiny", digits, 64, step),
            ("latents, S/2", latents, 8, small),
        ):
            consumed = functools.partial(_consume, split, batch)
            given, taken = alternate(consumed, take_step, PAIRS)
            results[name] = {
                "loader_images_per_second": spread([50 * batch / s for s in given]),
                "step_images_per_second": spread([batch / s for s in taken]),
                "ratio": spread([50 * b / a for a, b in zip(given, taken, strict=True)]),
            }
    return results


def _consume(split: Split, batch: int) -> float:
    """Seconds of 50 batches through the loader, in this process."""
    started = time.perf_counter()
    for _ in training_batches(split, seed=0, batch_size=batch, first=0, last=50):
        pass
    return time.perf_counter() - started


PARTS = {
    "256": tokens_256,
    "1024": tokens_1024,
    "4096": tokens_4096,
    "separation": separation,
    "tiny": tiny,
    "growth": growth,
    "compile": compiled,
    "sampling": sampling,
    "estimate": estimate,
    "loader": loader,
}


def main(names: list[str]) -> None:
    """Run parts and write their results into step.json, beside those of other parts."""
    path = FOLDER / "step.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in names or list(PARTS):
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER
        ).stdout.strip()
        print(f"{name}: {PARTS[name].__doc__}", flush=True)
        results[name] = {
            **PARTS[name](),
            "machine": {
                "processor": _processor(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "commit": commit,
            },
        }
        print(json.dumps(results[name], indent=2), flush=True)
        path.write_text(json.dumps(results, indent=2) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    main(sys.argv[1:])

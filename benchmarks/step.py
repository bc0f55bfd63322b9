"""The training step against its limit and against the reference; see step.md.

    python benchmarks/step.py            everything, about 20 minutes on two cores
    python benchmarks/step.py 256        one of: 256, 1024, 4096, separation, tiny, growth, compile

Both sides alternate in one run; figures are medians of at least seven pairs after warm-up.
"""

import dataclasses
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reference import ReferenceSiT, reference_losses, update_ema

from selfalign import RunConfig, draw_views, make_generator, recipe, resolve
from selfalign.benchmark.cost import step_cost
from selfalign.benchmark.measure import StepBenchmark, measure_limit

PAIRS = 7
FOLDER = Path(__file__).parent


def make_config(
    name: str, size: str, channels: int, side: int, batch: int, **more: Any
) -> RunConfig:
    """A resolved tree for made-up data with ten classes."""
    overrides = {"model.size": size, "training.batch_size": batch, "training.trackers": ()}
    return resolve(recipe(name, {**overrides, **more}), channels, (side, side), 10)


class ReferenceStep:
    """The reference's training step on the same data, weights and draws."""

    def __init__(self, config: RunConfig, product: StepBenchmark | None = None) -> None:
        self.config, model = config, config.model
        settings = {
            "channels": model.channels,
            "image_size": model.image_size,
            "patch_size": model.patch_size,
            "num_classes": model.num_classes,
            "qk_norm": model.qk_norm,
            **dataclasses.asdict(model.dimensions),
        }
        self.student, self.teacher = (ReferenceSiT(**settings) for _ in range(2))
        if product is not None:
            self.student.load_state_dict(product.take_step.student.state_dict())
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), 1e-4, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        batch = config.training.batch_size
        self.x0 = torch.randn(batch, model.channels, *model.image_size, generator=generator)
        self.labels = torch.randint(model.num_classes, (batch,), generator=generator)
        self.step = 0

    def __call__(self) -> float:
        config, alignment = self.config, self.config.alignment
        started = time.perf_counter()
        generator = make_generator(0, "views", self.step)
        draw = draw_views(config, self.x0.shape, generator)
        tokens = config.model.num_tokens
        group_ids = torch.zeros(len(self.x0), tokens, dtype=torch.long)
        if draw.order is not None:
            first = int(config.views.mask_ratios[0] * tokens)
            group_ids.fill_(1).scatter_(1, draw.order[:, :first], 0)
        out = reference_losses(
            self.student,
            self.teacher,
            self.x0,
            torch.where(draw.label_dropout, config.model.num_classes, self.labels),
            noise=draw.noise,
            timesteps=draw.timesteps,
            teacher_interval=draw.teacher_interval,
            group_ids=group_ids,
            teacher_labels=self.labels,
            method={
                "path": config.flow.path,
                "separate": config.views.attention == "separated",
                "teacher_timestep": alignment.teacher_timestep,
                "teacher_groups": alignment.teacher_groups,
                "student_block": alignment.student_block,
                "teacher_block": alignment.teacher_block,
                "distance": alignment.distance,
                "weight": alignment.weight,
            },
        )
        out["total"].backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.teacher, self.student, 0.9999)
        self.step += 1
        return time.perf_counter() - started


def alternate(
    first: Callable[[], float], second: Callable[[], float], pairs: int = PAIRS, warmup: int = 2
) -> tuple[list[float], list[float]]:
    """Seconds of both sides, taken in turn."""
    for _ in range(warmup):
        first()
        second()
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        taken[0].append(first())
        taken[1].append(second())
    return taken


def spread(values: list[float]) -> str:
    """Median, and the range of all values."""
    return f"{statistics.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]"


def against_limit(
    config: RunConfig, step: StepBenchmark | None = None
) -> tuple[list[float], dict[str, Any]]:
    """Share of the limit in several rounds; the limit is measured anew around each round."""
    step = step or StepBenchmark(config)
    for _ in range(3):
        step()
    shares, seconds, rates = [], [], []
    for _ in range(PAIRS):
        limit = measure_limit(config, repetitions=3)
        taken = statistics.median(step() for _ in range(3))
        shares.append(limit.seconds / taken)
        seconds.append(taken)
        rates.append(limit.gemm_flops_per_second)
    details = {
        "seconds_per_step": spread(seconds),
        "gemm_gflops": spread([rate / 1e9 for rate in rates]),
        "flops_per_step": step_cost(config, config.training.batch_size).flops,
    }
    return shares, details


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


def _against_both(config: RunConfig) -> dict[str, Any]:
    product = StepBenchmark(config)
    reference = ReferenceStep(config, product)
    own, other = alternate(product, reference)
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    del reference
    gc.collect()
    shares, details = against_limit(config, product)
    return {
        "share_of_limit": spread(shares),
        "speed_against_reference": spread(ratios),
        "reference_seconds": spread(other),
        **details,
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
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
    own, other = alternate(separated, full)
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return {"cost_of_separated_over_full": spread(ratios)}


def tiny() -> dict[str, Any]:
    """The demo's step: tiny/1 on digits, batch 64."""
    config = make_config("sra-dts-as", "tiny", 1, 8, 64)
    step = StepBenchmark(config)
    shares, details = against_limit(config, step)
    pieces = [step.parts() for _ in range(15)]
    parts = {name: statistics.median(piece[name] for piece in pieces) for name in pieces[0]}
    return {
        "share_of_limit": spread(shares),
        **details,
        "milliseconds_by_part": {name: round(1e3 * s, 2) for name, s in parts.items()},
    }


def growth() -> dict[str, Any]:
    """Step time over tokens and groups, beside the count of operations."""
    rows: dict[str, Any] = {"tokens": {}, "groups": {}}
    for side, batch in ((16, 16), (32, 4), (64, 1), (128, 1)):
        config = make_config("sra-dts-as", "S/2", 4, side, batch)
        rows["tokens"][config.model.num_tokens] = _time_and_count(config)
    for groups in (1, 2, 3, 4, 8):
        more = {"views.mask_ratios": (1.0,) * groups}
        name = "sra-dts-as" if groups > 1 else "sra"
        config = make_config(name, "S/2", 4, 64, 1, **more)
        rows["groups"][groups] = _time_and_count(config)
    plot_growth(rows, FOLDER / "growth.png")
    return rows


def _time_and_count(config: RunConfig) -> dict[str, float]:
    step = StepBenchmark(config)
    step()
    batch = config.training.batch_size
    seconds = statistics.median(step() for _ in range(5)) / batch
    return {
        "seconds_per_image": seconds,
        "gflops_per_image": step_cost(config, batch).flops / batch / 1e9,
    }


def plot_growth(rows: dict[str, Any], path: Path) -> None:
    """Measured seconds per image beside the count of operations at one rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=144, layout="constrained")
    for axis, (name, points) in zip(figure.subplots(1, 2), rows.items(), strict=True):
        x = list(points)
        seconds = [point["seconds_per_image"] for point in points.values()]
        flops = [point["gflops_per_image"] for point in points.values()]
        rate = statistics.median(f / s for f, s in zip(flops, seconds, strict=True))
        axis.plot(x, seconds, marker="o", label="measured")
        axis.plot(x, [f / rate for f in flops], "--", label=f"operations at {rate:.0f} GFLOP/s")
        if name == "tokens":
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
        axis.set(xlabel=name, ylabel="seconds per image")
        axis.set_ylim(bottom=0 if name == "groups" else None)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path)


def compiled() -> dict[str, Any]:
    """torch.compile against eager, alternating, after compilation."""
    results = {}
    for label, config in (
        ("tiny on digits", make_config("sra-dts-as", "tiny", 1, 8, 64)),
        ("S/2, 256 tokens", make_config("sra-dts-as", "S/2", 4, 32, 8)),
    ):
        eager = StepBenchmark(config)
        training = dataclasses.replace(config.training, compile=True)
        fast = StepBenchmark(dataclasses.replace(config, training=training))
        own, other = alternate(fast, eager, warmup=3)
        recompiled = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        ratios = [b / a for a, b in zip(own, other, strict=True)]
        results[label] = {"speed_against_eager": spread(ratios), "graphs": recompiled}
    return results


PARTS = {
    "256": tokens_256,
    "1024": tokens_1024,
    "4096": tokens_4096,
    "separation": separation,
    "tiny": tiny,
    "growth": growth,
    "compile": compiled,
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

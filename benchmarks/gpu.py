"""Everything that has to be seen on a CUDA GPU, in one command; at most eight minutes on an H100.

    python benchmarks/gpu.py [--out FOLDER] [--parts PART …] [--device cpu --dry]

Needs torch (2.11 or later), numpy, accelerate, safetensors and jaxtyping alone. Every part runs in a
process of its own under a time limit of its own: what fails, or is not finished, is reported with what
it had found until then. Writes gpu.json and gpu.md; run again with the same folder it goes on with what
was not finished. `--device cpu --dry` takes the same ways with tiny shapes, so that the script works on
the day it is needed.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from reference import reference_sde  # noqa: E402
from sides import ReferenceStep, alternate, in_a_row, make_config, spread  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402

from selfalign import (  # noqa: E402
    EMA,
    Objective,
    ResolvedConfig,
    draw_views,
    make_generator,
)
from selfalign.benchmark.cost import Rates, step_cost  # noqa: E402
from selfalign.benchmark.limit import seconds_of, synchronize  # noqa: E402
from selfalign.benchmark.measure import StepBenchmark, make_model  # noqa: E402
from selfalign.sampling.generate import generate  # noqa: E402
from selfalign.sampling.settings import SamplingConfig  # noqa: E402

GIB = 2**30
PAIRS = 5
LONGEST_CELL = 6
"""Entries of a table's cell."""
IN_A_ROW = 3
"""Steps that are timed together: training waits for none of them."""
BANDWIDTH_BYTES = 2**30
"""Of the copy that the memory's rate is taken from."""
GRAIN, LARGEST = 8, 1024
"""Batches are multiples of the one, up to the other."""
MODES = ("eager", "against the reference", "compiled")
FILLED = 0.9
"""Share of the device's memory that the largest batch may take."""


@dataclasses.dataclass
class Bench:
    """Where the parts run, in which shapes, and what they have found so far."""

    device: torch.device
    dry: bool
    save: Callable[[dict[str, Any]], None]
    """Keeps what a part has found so far."""
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the part had found when its time ended before."""

    @property
    def sizes(self) -> tuple[str, ...]:
        """Sizes of models, the most telling first."""
        return ("tiny/2",) if self.dry else ("XL/2", "L/2", "B/2", "S/2")

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of latents that make 256 and 1,024 tokens."""
        return (8, 16) if self.dry else (32, 64)

    def config(self, name: str, size: str, side: int, batch: int, **more: Any) -> ResolvedConfig:
        """A tree in bf16, as large models are trained."""
        return make_config(name, size, 4, side, batch, **{"training.precision": "bf16", **more})

    def free_memory(self) -> None:
        """Forget what earlier measurements left on the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Largest memory on the device since it was freed."""
        return torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else 0.0


def set_tf32(allowed: bool) -> None:
    """Whether CUDA multiplies float32 matrices in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def recorded(bench: Bench) -> dict[str, Any]:
    """Recorded behaviour of the released code: the largest error per file, TF32 off and on."""
    from golden import check

    files = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
    found: dict[str, Any] = {"tolerance": check.TOLERANCE, "errors": {}}
    read = check.read

    def read_there(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        meta, tensors = read(file)
        return meta, {name: tensor.to(bench.device) for name, tensor in tensors.items()}

    check.read = read_there
    for file in files[:2] if bench.dry else files:
        errors = {}
        for name, allowed in (("off", False), ("on", True)):
            set_tf32(allowed)
            with torch.device(bench.device):
                errors[name] = dict(check.check(file))
        worst = {name: max(values, key=values.__getitem__) for name, values in errors.items()}
        found["errors"][file.stem] = {
            f"tf32_{name}": {"worst": worst[name], "error": errors[name][worst[name]]}
            for name in errors
        } | {"tensors": len(errors["off"])}
        bench.save(found)
    off = [entry["tf32_off"]["error"] for entry in found["errors"].values()]
    return found | {"within_tolerance": bool(max(off) <= check.TOLERANCE)}


def waits(bench: Bench) -> dict[str, Any]:
    """Steps under CUDA's synchronization check: none may wait for the device."""
    found = {}
    for name in ("sit", "self-flow", "sra-dts-as"):
        step = StepBenchmark(bench.config(name, "tiny/2", bench.sides[0], 4))
        step(), step()
        if bench.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(3):
                step.take_step(10 + number, [step.batch])
            found[name] = "waits for nothing" if bench.device.type == "cuda" else "ran"
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
        finally:
            if bench.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return found


def determinism(bench: Bench) -> dict[str, Any]:
    """Ten steps twice, and five, saved, loaded and five more: the same weights, bit for bit?"""
    # Without this, cuBLAS may choose another algorithm for the same product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = {}
    for label, strict in (("as it is", False), ("deterministic algorithms", True)):
        torch.use_deterministic_algorithms(strict, warn_only=True)
        for precision in ("fp32", "bf16"):
            config = bench.config(
                "sra-dts-as", "tiny/2", bench.sides[0], 8, **{"training.precision": precision}
            )
            first, second = _steps(config, 0, 10, None), _steps(config, 0, 10, None)
            resumed = _steps(config, 5, 10, _steps(config, 0, 5, None))
            found[f"{label}, {precision}"] = {
                "repeated": first == second,
                "resumed": first == resumed,
            }
            bench.save(found)
    torch.use_deterministic_algorithms(False)
    return found


def _steps(config: ResolvedConfig, first: int, last: int, saved: bytes | None) -> bytes:
    """Weights, average and optimizer after some steps, from what was saved or from the start."""
    step = StepBenchmark(config)
    parts = (step.take_step.student, step.ema.model, step.take_step._optimizer)
    if saved is not None:
        states = torch.load(io.BytesIO(saved), weights_only=True, map_location=step.batch[0].device)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    for number in range(first, last):
        step.take_step(number, [step.batch])
    out = io.BytesIO()
    torch.save([part.state_dict() for part in parts], out)
    return out.getvalue()


def devices(bench: Bench) -> dict[str, Any]:
    """Twenty steps in float32 on the CPU and on the device, from the same weights and draws."""
    set_tf32(False)
    found = {}
    for name in ("sit", "self-flow", "sra-dts-as"):
        here, there = (
            _losses(name, bench.sides[0], device) for device in (torch.device("cpu"), bench.device)
        )
        apart = [abs(a - b) / abs(a) for a, b in zip(here, there, strict=True)]
        found[name] = {"largest_relative_difference": max(apart), "last_loss": there[-1]}
        bench.save(found)
    return found


def _losses(name: str, side: int, device: torch.device) -> list[float]:
    config = make_config(name, "tiny/2", 4, side, 8)
    torch.manual_seed(0)
    student = make_model(config).to(device)
    ema, objective = EMA(student, decay=0.999), Objective(config)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(8, 4, side, side, generator=generator)
    labels = torch.randint(10, (8,), generator=generator)
    found = []
    for step in range(20):
        draw = draw_views(config, x0, make_generator(0, "views", step))
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(draw)
            if isinstance(value := getattr(draw, field.name), torch.Tensor)
        }
        draw = dataclasses.replace(draw, **moved)
        loss = objective(student, ema.model, x0.to(device), labels.to(device), draw, step).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step)
        found.append(loss.item())
    return found


def compiler(bench: Bench) -> dict[str, Any]:
    """torch.compile: graphs, seconds of the first step, and speed against eager, by region."""
    found = {}
    for name, region in (
        ("sra-dts-as", "objective"),
        ("sra-dts-as", "blocks"),
        ("sit", "objective"),
    ):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        size, side = ("tiny/2", 8) if bench.dry else ("S/2", 32)
        batch = 8 if bench.dry else 128
        eager = StepBenchmark(bench.config(name, size, side, batch))
        more = {"training.compile": True, "training.compile_region": region}
        fast = StepBenchmark(bench.config(name, size, side, batch, **more))
        seconds = fast()
        sides = (in_a_row(step, IN_A_ROW, bench.device) for step in (fast, eager))
        own, other = alternate(*sides, 2 if bench.dry else PAIRS)
        found[f"{name}, {size}, {region}"] = {
            "graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0),
            "seconds_of_first_step": round(seconds, 1),
            "speed_against_eager": spread([b / a for a, b in zip(own, other, strict=True)]),
        }
        bench.save(found)
    return found


def matmul_peak(bench: Bench) -> float:
    """Operations per second of a large product in bf16: what shares of the peak refer to."""
    side = 256 if bench.dry else 8192
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    times = [seconds_of(lambda: [a @ b for _ in range(10)], bench.device) for _ in range(5)]
    return 10 * 2 * side**3 / min(times)


def largest_batch(bench: Bench, make: Callable[[int], Callable[[], float]]) -> int:
    """The largest number of samples, in whole `GRAIN`s, whose step fits into the device's memory.

    Two small steps tell what a sample takes; less is tried where that promised too much.
    """
    if bench.dry:
        return 4
    peaks = []
    for batch in (GRAIN, 2 * GRAIN):
        step = make(batch)
        step(), step()
        peaks.append(torch.cuda.max_memory_allocated())
        del step
        bench.free_memory()
    free, _ = torch.cuda.mem_get_info()
    further = (FILLED * free - peaks[1]) // (peaks[1] - peaks[0])
    batch = min(LARGEST, GRAIN * (2 + max(0, int(further))))
    while batch > GRAIN:
        try:
            step = make(batch)
            step(), step()
        except torch.OutOfMemoryError:
            batch -= GRAIN * max(1, batch // (8 * GRAIN))
        else:
            break
        finally:
            step = None  # type: ignore[assignment]
            bench.free_memory()
    return batch


def device_rates(bench: Bench) -> Rates:
    """Large products in bf16 and large copies, as fast as this device makes them."""
    numbers = torch.randn((2**20 if bench.dry else BANDWIDTH_BYTES) // 4, device=bench.device)
    other = torch.empty_like(numbers)
    copy = min(seconds_of(lambda: other.copy_(numbers), bench.device) for _ in range(5))
    bandwidth = 2 * numbers.numel() * 4 / copy
    peak = matmul_peak(bench)
    return Rates(peak, peak, bandwidth, bandwidth)


class Case(NamedTuple):
    """A step that is measured; the beginning of its row."""

    size: str
    tokens: int
    recipe: str
    mode: str

    def config(self, bench: Bench, batch: int) -> ResolvedConfig:
        """Its tree."""
        compiled = {"training.compile": self.mode == "compiled"}
        return bench.config(self.recipe, self.size, 2 * math.isqrt(self.tokens), batch, **compiled)


def steps(bench: Bench) -> dict[str, Any]:
    """Seconds per step, share of the bf16 peak, memory and the estimate, by size, recipe and mode."""
    rates = device_rates(bench)
    bench.free_memory()
    rows = [row for row in bench.before.get("rows", ()) if "failed" not in row]
    found = {"copy_gb_per_second": rates.memory / 1e9, "rows": rows}
    batches = {Case(*(row[name] for name in Case._fields)): row["batch"] for row in rows}
    for case in _step_cases(bench):
        if case in batches:
            continue
        try:
            row = _measure(bench, rates, case, batches.get(case._replace(mode="eager")))
            batches[case] = row["batch"]
        except Exception as error:  # noqa: BLE001 - one case that fails says nothing of the others
            line = (str(error).splitlines() or [""])[0]
            row = {"failed": f"{type(error).__name__}: {line}"}
        rows.append({**case._asdict(), **row})
        bench.free_memory()
        bench.save(found)
    return found


def _step_cases(bench: Bench) -> Iterator[Case]:
    """The most telling first: the time may not suffice for all."""
    few, many = ((side // 2) ** 2 for side in bench.sides)
    largest, *smaller = bench.sizes
    plain, fast = MODES[0], MODES[-1]
    for tokens, mode in itertools.product((few, many), MODES):
        yield Case(largest, tokens, "sra-dts-as", mode)
    # The same with attention across groups; the other two recipes.
    others = (
        (many, "sra-dts"),
        (few, "sit"),
        (few, "self-flow"),
        (many, "self-flow"),
        (many, "sit"),
    )
    for (tokens, name), mode in itertools.product(others, (plain, fast)):
        yield Case(largest, tokens, name, mode)
    for mode, tokens, size in itertools.product(MODES, (few, many), smaller):
        yield Case(size, tokens, "sra-dts-as", mode)
    rest = itertools.product(("self-flow", "sit"), (plain, fast), (few, many), smaller)
    for name, mode, tokens, size in rest:
        yield Case(size, tokens, name, mode)


def _measure(bench: Bench, rates: Rates, case: Case, batch: int | None) -> dict[str, Any]:
    """A row. The batch is that of the same step run eagerly, where it has been found."""
    if case.mode == "against the reference":
        return _against_reference(bench, case)
    if case.mode not in MODES:
        raise ValueError(f"mode {case.mode!r}: allowed are {', '.join(MODES)}")
    if batch is None:
        eager = case._replace(mode="eager")
        batch = largest_batch(bench, lambda batch: StepBenchmark(eager.config(bench, batch)))
    config = case.config(bench, batch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = StepBenchmark(config)
    first = step()
    step()
    timed = in_a_row(step, IN_A_ROW, bench.device)
    seconds = [timed() for _ in range(2 if bench.dry else 3)]
    median = statistics.median(seconds)
    cost = step_cost(config, batch)
    return {
        "batch": batch,
        "seconds": spread(seconds),
        "images_per_second": batch / median,
        "peak_tflops": rates.matmuls / 1e12,
        "share_of_peak": cost.flops / median / rates.matmuls,
        "estimate_over_measured": cost.seconds(rates) / median,
        "peak_gib": bench.peak_gib(),
        "seconds_of_first_step": round(first, 1),
        "graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0),
    }


def _against_reference(bench: Bench, case: Case) -> dict[str, Any]:
    def both(batch: int) -> tuple[StepBenchmark, ReferenceStep]:
        config = case.config(bench, batch)
        product = StepBenchmark(config)
        return product, ReferenceStep(config, product)

    def together(batch: int) -> Callable[[], float]:
        product, reference = both(batch)
        return lambda: product() + reference()

    batch = largest_batch(bench, together)
    sides = (in_a_row(side, IN_A_ROW, bench.device) for side in both(batch))
    own, other = alternate(*sides, 2 if bench.dry else 3, warmup=1)
    return {
        "batch": batch,
        "seconds": spread(own),
        "reference_seconds": spread(other),
        "speed_against_reference": spread([b / a for a, b in zip(own, other, strict=True)]),
    }


def sampling(bench: Bench) -> dict[str, Any]:
    """250 SDE steps with guidance in an interval, timed over 10: every step costs the same."""
    size, side = bench.sizes[0], bench.sides[0]
    batch = 2 if bench.dry else 64
    config = bench.config("sit", size, side, batch)
    model = make_model(config, bench.device).eval().requires_grad_(False)
    settings = SamplingConfig("sde", 10, 1.8, (0.0, 0.7))
    with bench.device:
        reference = ReferenceStep(config).student.eval().requires_grad_(False)
    reference.load_state_dict(model.state_dict(), strict=False)  # sampling needs no head
    noise = torch.randn(batch, 4, side, side, device=bench.device)
    labels = torch.randint(10, (batch,), device=bench.device)

    def own() -> float:
        return seconds_of(
            lambda: list(generate(model, "linear", settings, batch, batch_size=batch)), bench.device
        )

    def other() -> float:
        return seconds_of(
            lambda: reference_sde(
                reference,
                noise,
                labels,
                10,
                10,
                1.8,
                (0.0, 0.7),
                lambda step: torch.randn_like(noise),
            ),
            bench.device,
        )

    found = {"size": size, "batch": batch}
    for label, precision in (("fp32 with TF32", None), ("bf16", torch.bfloat16)):
        set_tf32(True)
        with _autocast(bench.device, precision):
            mine, theirs = alternate(own, other, 2 if bench.dry else 3, warmup=1)
        found[label] = {
            "images_per_second_of_250_steps": spread([batch / (25 * s) for s in mine]),
            "speed_against_reference": spread([b / a for a, b in zip(mine, theirs, strict=True)]),
        }
        bench.save(found)
    return found


def _autocast(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


KINDS = {
    "update": ("multi_tensor_apply", "foreach"),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matmuls": ("nvjet", "gemm", "cutlass", "cublas", "xmma", "addmm", "aten::mm", "aten::bmm"),
}
"""What a kernel's name has in it, by what it does: `update` is clipping, optimizer and average, and what
no name fits is norms, gates, casts and copies."""


def profile(bench: Bench) -> dict[str, Any]:
    """Where a step of the largest model goes: kinds of kernels, and the longest, by share of time."""
    batch = 2 if bench.dry else 64
    cuda = bench.device.type == "cuda"
    watched = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        watched.append(torch.profiler.ProfilerActivity.CUDA)
    # torch's operations count their kernels' time as their own, too.
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    found = {}
    for mode in ("eager", "compiled"):
        more = {"training.compile": mode == "compiled"}
        config = bench.config("sra-dts-as", bench.sizes[0], bench.sides[0], batch, **more)
        step = StepBenchmark(config)
        step(), step()
        seconds = in_a_row(step, IN_A_ROW, bench.device)()
        with torch.profiler.profile(activities=watched) as profiler:
            step()
        taken = {
            event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
            for event in profiler.key_averages()
            if event.device_type == wanted
            and "#" not in event.key  # which marks a range, not a kernel
        }
        total = sum(taken.values()) or 1.0
        kinds = dict.fromkeys((*KINDS, "other"), 0.0)
        for name, value in taken.items():
            fits = (k for k, parts in KINDS.items() if any(part in name for part in parts))
            kinds[next(fits, "other")] += value / total
        longest = sorted(taken.items(), key=lambda item: -item[1])[:20]
        found[mode] = {
            "seconds": seconds,
            "busy_seconds": total / 1e6,
            "kinds": {name: round(value, 4) for name, value in kinds.items()},
            "longest": {name[:120]: round(value / total, 4) for name, value in longest},
        }
        bench.save(found)
        del step
        bench.free_memory()
    return found


PARTS: dict[str, tuple[Callable[[Bench], dict[str, Any]], int]] = {
    "recorded": (recorded, 30),
    "waits": (waits, 25),
    "determinism": (determinism, 40),
    "devices": (devices, 40),
    "steps": (steps, 180),
    "compiler": (compiler, 75),
    "sampling": (sampling, 45),
    "profile": (profile, 45),
}
"""Each part and its limit in seconds; together eight minutes."""
DRY_PATIENCE = 5
"""How much longer parts may take in a dry run: processors compile slowly."""


def describe(device: torch.device) -> dict[str, Any]:
    """Card, driver, versions, commit."""
    said = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "device": platform.processor() or "CPU",
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        said |= {
            "device": card.name,
            "memory_gib": round(card.total_memory / GIB, 1),
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return said


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def run_part(name: str, device: torch.device, dry: bool, file: Path) -> None:
    """Run one part in this process; what it has found is always in the file."""

    def save(found: dict[str, Any]) -> None:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(file)

    before = json.loads(file.read_text()) if file.exists() else {}
    bench = Bench(device, dry, save, before)
    part, _ = PARTS[name]
    save(part(bench))


def run_all(names: list[str], device: torch.device, dry: bool, out: Path) -> dict[str, Any]:
    """Run parts, each in a process of its own, and write both files after each.

    A folder with results of the same machine is gone on with: parts that were complete stay as they are,
    and of the steps only those are taken that have not been.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": describe(device), "parts": {}}
    if (out / "gpu.json").exists():
        earlier = json.loads((out / "gpu.json").read_text())
        if earlier["machine"] == results["machine"]:
            results["parts"] = earlier["parts"]
    for name in names:
        file, (_, limit) = out / f"part-{name}.json", PARTS[name]
        file.unlink(missing_ok=True)
        if earlier := results["parts"].get(name):
            if not earlier["failure"]:
                print(f"{name}: measured before", flush=True)
                continue
            file.write_text(json.dumps(earlier["found"]))
        command = [sys.executable, __file__, "--part", name, "--device", str(device)]
        command += ["--out", str(out), *(["--dry"] if dry else [])]
        print(f"{name}: {(PARTS[name][0].__doc__ or '').splitlines()[0]}", flush=True)
        started, failure = time.perf_counter(), ""
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=DRY_PATIENCE * limit if dry else limit,
                check=False,
            )
            if done.returncode:
                failure = "\n".join(done.stderr.strip().splitlines()[-12:])
        except subprocess.TimeoutExpired:
            failure = "not finished in its time"
        found = json.loads(file.read_text()) if file.exists() else {}
        if bad := [row["failed"] for row in found.get("rows", ()) if "failed" in row]:
            failure = "\n".join([failure, f"{len(bad)} cases failed, the first: {bad[0]}"]).strip()
        file.unlink(missing_ok=True)
        file.with_suffix(".partial").unlink(missing_ok=True)
        seconds = round(time.perf_counter() - started, 1)
        results["parts"][name] = {"seconds": seconds, "failure": failure, "found": found}
        print(f"  {seconds} s{': ' + failure if failure else ''}", flush=True)
        (out / "gpu.json").write_text(json.dumps(results, indent=1, allow_nan=True) + "\n")
        (out / "gpu.md").write_text(page(results))
    return results


def page(results: dict[str, Any]) -> str:
    """The results as a page: a section per part, a table where there are rows."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = ["# On a GPU", "", f"`python benchmarks/gpu.py` on: {machine}.", ""]
    for name, part in results["parts"].items():
        lines += [f"## {name}", "", (PARTS[name][0].__doc__ or "").splitlines()[0], ""]
        if part["failure"]:
            lines += [f"**Not complete**: {part['failure'].splitlines()[-1]}", ""]
        lines += _section(part["found"])
    return "\n".join(lines).rstrip() + "\n"


def _section(found: dict[str, Any]) -> list[str]:
    if found and all(isinstance(value, dict) for value in found.values()):
        found = {"": found}
    lines = []
    for key, value in found.items():
        if isinstance(value, list) and value:
            lines += ["", *_table(value), ""]
        elif isinstance(value, dict) and value and isinstance(next(iter(value.values())), dict):
            lines += ["", *_table([{key: name, **row} for name, row in value.items()]), ""]
        else:
            lines.append(f"- {key.replace('_', ' ')}: {_word(value)}")
    return [*lines, ""]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a table; what is longer than a cell is in gpu.json alone."""
    rows = [
        {
            name: value
            for name, value in row.items()
            if not (isinstance(value, dict) and len(value) > LONGEST_CELL)
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [
        f"| {' | '.join(column.replace('_', ' ') for column in columns)} |",
        "|" + " --- |" * len(columns),
        *(f"| {' | '.join(_word(row.get(column, '')) for column in columns)} |" for row in rows),
    ]


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_word(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else str(value)
    return str(value)


def main() -> int:
    """Run all parts, or, as `--part`, one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder of the results"
    )
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--dry", action="store_true", help="tiny shapes")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    words = parser.parse_args()
    device = torch.device(words.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.py: error: --device is cuda, and torch finds none here; a dry run: --device cpu --dry",
              file=sys.stderr)  # fmt: skip
        return 2
    if words.part is None:
        results = run_all(words.parts, device, words.dry, words.out)
        failed = [name for name, part in results["parts"].items() if part["failure"]]
        print(
            f"written: {words.out / 'gpu.md'}"
            + (f"; not complete: {', '.join(failed)}" if failed else "")
        )
        return 1 if failed else 0
    try:
        run_part(words.part, device, words.dry, words.out / f"part-{words.part}.json")
        synchronize(device)
    except Exception:  # noqa: BLE001 - said in one place, by the process that waits
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

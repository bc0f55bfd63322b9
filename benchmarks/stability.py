"""Where training diverges, over width, depth, precision, qk-norm, timesteps and separation; see docs/results.

    python benchmarks/stability.py RUNS.jsonl --minutes 15     go on with the grid, for so many CPU minutes
    python benchmarks/stability.py RUNS.jsonl --page           print the page's tables

Every finished run is a line of the file; a run that is there is not repeated.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from selfalign import recipe, resolve
from selfalign.backbones.sit.sizes import SIZES, Size
from selfalign.config import ResolvedConfig
from selfalign.data.datasets import open_data
from selfalign.data.stream import training_batches
from selfalign.sections import DataConfig
from selfalign.student import build_student
from selfalign.training.accelerator import make_accelerator
from selfalign.training.ema import EMA
from selfalign.training.step import TrainingStep, make_optimizer
from selfalign.views import make_views

STEPS, BATCH = 120, 16
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RECIPES = {
    "sra": "single, full",
    "sra-dts": "dual, full",
    "sra-as": "single, separated",
    "sra-dts-as": "dual, separated",
}
SHAPES = {"w48 d4": (48, 4), "w96 d4": (96, 4), "w48 d12": (48, 12), "w192 d4": (192, 4)}
for _name, (_width, _depth) in SHAPES.items():
    SIZES[_name] = Size(_width, _depth, _width // 24)
SEEDS, EDGE = (1, 2, 3), (3e-3, 1e-2)
"""Further seeds where the widest model's edge is: one seed of each cell says little of a factor of three."""
SPIKE = 1.5
"""A loss above so many times the median of the twenty before it."""


def grid() -> Iterator[dict[str, Any]]:
    """All runs, the most telling ones first."""
    base = {"seed": 0, "shape": "w48 d4", "qk_norm": False, "precision": "fp32"}
    changes: list[dict[str, Any]] = [
        {},
        {"qk_norm": True},
        {"shape": "w48 d12"},
        {"shape": "w96 d4"},
        {"precision": "bf16"},
        {"shape": "w48 d12", "qk_norm": True},
        {"shape": "w192 d4"},
    ]
    for change, name, rate in itertools.product(changes, RECIPES, RATES):
        yield {**base, **change, "recipe": name, "learning_rate": rate}
    for seed, name, rate in itertools.product(SEEDS, RECIPES, EDGE):
        yield {**base, "seed": seed, "shape": "w192 d4", "recipe": name, "learning_rate": rate}


def make(run: dict[str, Any]) -> ResolvedConfig:
    """A run's tree: digits, 16 tokens."""
    settings = {
        "seed": run["seed"],
        "model.size": f"{run['shape']}/2",
        "model.qk_norm": run["qk_norm"],
        "training.precision": run["precision"],
        "training.learning_rate": run["learning_rate"],
        "training.batch_size": BATCH,
        "training.steps": STEPS,
        "training.warmup_steps": 10,
        "training.on_nonfinite": f"skip:{STEPS}",
        "training.trackers": (),
    }
    return resolve(recipe(run["recipe"], settings), 1, (8, 8), 10)


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Train a run and return what is recorded of it."""
    config = make(run)
    split = open_data(DataConfig()).train
    accelerator = make_accelerator(config.training, Path())
    student = build_student(config).train()
    ema = EMA(student, config.training.ema_decays[0])
    take_step = TrainingStep(config, accelerator, student, ema, make_optimizer(config, student))
    losses, norms = [], []
    gradients: list[list[float]] = []
    for step, batch in enumerate(
        training_batches(split, seed=run["seed"], batch_size=BATCH, first=0, last=STEPS)
    ):
        loss = take_step.forward(step, batch)
        accelerator.backward(loss.total)
        gradients.append([norm_of(block) for block in student.blocks])
        norms.append(float(take_step.update(step, [loss])))
        losses.append(float(loss.terms["denoising"].detach().mean()))
    return {
        **run,
        "losses": [round(value, 5) if math.isfinite(value) else None for value in losses],
        "gradient_norm_median": finite(statistics.median(norms)),
        "gradient_norm_largest": finite(max(norms)),
        "gradient_norms_of_blocks": [
            finite(statistics.median(values)) for values in zip(*gradients, strict=True)
        ],
        "activations": activations(config, student, split),
        "skipped": take_step.finite.skipped(),
    }


def norm_of(module: torch.nn.Module) -> float:
    """Norm of a module's gradient."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


@torch.no_grad()
def activations(config: ResolvedConfig, student: Any, split: Any) -> list[list[float | None]]:
    """Root mean square of every block's output, by group, on one batch."""
    from selfalign import draw_views, make_generator

    x0, labels = split.read(range(64))
    views = make_views(config, x0, draw_views(config, x0, make_generator(0, "stability")))
    taps = range(1, len(student.blocks) + 1)
    output = student(
        views.student.tokens, views.student.timesteps, labels, views.groups, tuple(taps)
    )
    return [
        [
            finite(output.features[tap][:, part].square().mean().sqrt())
            for part in views.groups.slices
        ]
        for tap in taps
    ]


def finite(value: Any) -> float | None:
    """Four digits; None for what is not finite."""
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None


def spikes(losses: list[float | None]) -> int:
    """How many losses stand out, or are not finite."""
    found = 0
    for step in range(20, len(losses)):
        before = [value for value in losses[step - 20 : step] if value is not None]
        loss = losses[step]
        found += loss is None or not before or loss > SPIKE * statistics.median(before)
    return found


def final(run: dict[str, Any]) -> float | None:
    """Mean of the last 20 losses; None where one is not finite."""
    last = run["losses"][-20:]
    return None if None in last else statistics.fmean(last)


def diverged(run: dict[str, Any]) -> bool:
    """Whether a run has not learnt: its end is not clearly below the untrained model's zero velocity."""
    end = final(run)  # the first loss is that of the untrained model, whose velocity is zero
    return end is None or run["skipped"] > 0 or end >= 0.9 * run["losses"][0]


def tables(runs: list[dict[str, Any]]) -> str:
    """The page's tables."""
    lines: list[str] = []

    def of(**wanted: Any) -> list[dict[str, Any]]:
        wanted = {"seed": 0, **wanted}
        return [run for run in runs if all(run[key] == value for key, value in wanted.items())]

    settings = sorted(
        {(run["shape"], run["qk_norm"], run["precision"]) for run in runs},
        key=lambda each: (each[2] != "fp32", list(SHAPES).index(each[0]), each[1]),
    )
    heads = " | ".join(f"{rate:g}" for rate in RATES)
    lines += [
        f"| model | timesteps, attention | {heads} | largest rate that trains |",
        "| --- | --- | " + "--- | " * (len(RATES) + 1),
    ]
    for shape, qk_norm, precision in settings:
        for name, what in RECIPES.items():
            cells, edge, holds = [], None, True
            for rate in RATES:
                found = of(
                    shape=shape,
                    qk_norm=qk_norm,
                    precision=precision,
                    recipe=name,
                    learning_rate=rate,
                )
                if not found:
                    cells.append("")
                    continue
                run = found[0]
                count = spikes(run["losses"])
                cells.append(_end(run) + f" ({count})" * (count > 0 and not diverged(run)))
                holds = holds and not diverged(run)
                edge = rate if holds else edge
            model = f"{shape}{', qk-norm' * qk_norm}{', bf16' * (precision == 'bf16')}"
            lines.append(
                f"| {model} | {what} | {' | '.join(cells)} | {'none' if edge is None else f'{edge:g}'} |"
            )
    lines += [
        "",
        "| model | timesteps, attention | rate | gradient norm by block | activations by block, group 1 | "
        "group 2 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rate in (1e-3, 1e-2):
        for shape, qk_norm, precision in settings:
            if precision != "fp32" or qk_norm:
                continue
            for name, what in RECIPES.items():
                for run in of(
                    shape=shape, qk_norm=False, precision="fp32", recipe=name, learning_rate=rate
                ):
                    groups = list(zip(*run["activations"], strict=True))
                    shown = [run["gradient_norms_of_blocks"], *groups]
                    cells = [_listed(values) for values in shown] + [""] * (3 - len(shown))
                    lines.append(f"| {shape} | {what} | {rate:g} | {' | '.join(cells)} |")
    seeds = (0, *SEEDS)
    lines += [
        "",
        f"| w192 d4: timesteps, attention | rate | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        "| --- | --- | " + "--- | " * len(seeds),
    ]
    for rate, (name, what) in itertools.product(EDGE, RECIPES.items()):
        cells = []
        for seed in seeds:
            cell = {"shape": "w192 d4", "qk_norm": False, "precision": "fp32", "recipe": name}
            found = of(seed=seed, learning_rate=rate, **cell)
            cells.append(_end(found[0]) if found else "")
        lines.append(f"| {what} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _end(run: dict[str, Any]) -> str:
    """A run's last loss; bold where it has not learnt."""
    end = final(run)
    text = "–" if end is None else f"{end:.3f}" if end < 100 else f"{end:.1e}"
    return f"**{text}**" if diverged(run) else text


def _listed(values: Any) -> str:
    return ", ".join("–" if value is None else f"{value:.2g}" for value in values)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    arguments.runs.parent.mkdir(parents=True, exist_ok=True)
    arguments.runs.touch()
    runs = [json.loads(line) for line in arguments.runs.read_text().splitlines()]
    if arguments.page:
        print(tables(runs))
        return
    torch.set_num_threads(1)
    done = [{key: run[key] for key in next(grid())} for run in runs]
    for run in grid():
        if time.process_time() > 60 * arguments.minutes:
            break
        if run not in done:
            found = measure(run)
            with arguments.runs.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{run} {final(found)} diverged={diverged(found)}", flush=True)


if __name__ == "__main__":
    main()

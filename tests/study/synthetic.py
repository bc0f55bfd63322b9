"""Studies made up from known numbers, for the tests of statistics and report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfalign.study.grid import Effect, Grid, Row, Table, Variant
from selfalign.study.plan import Study, write_study
from selfalign.study.results import FAILED_SUFFIX, RUNS, RunResult, write_result
from selfalign.study.settings import Measurement
from selfalign.study.verdicts import register

SETTINGS = {"model.size": "tiny/2", "training.steps": 400, "training.batch_size": 16}
EFFECT = Effect("Separation", "Does it help?", (("sra-as", "sra"),), "Yes, it does.")
GRID = Grid(
    "small",
    {name: Variant(name) for name in ("sit", "sra", "sra-as", "sra-dts-as")},
    tables=(
        Table(
            "Methods",
            (
                Row("sit", {"attention": "full"}, {"FID": 2.06}),
                Row("sra", {"attention": "full"}, {"FID": 1.58}),
                Row("sra-as", {"attention": "separated"}),
                Row("sra-dts-as", {"attention": "separated"}, {"FID": 1.44}),
            ),
            "Beside each other.",
        ),
        Table("Attention", (Row("sra"), Row("sra-as"))),
    ),
    effects=(
        EFFECT,
        Effect("Both", "Do both help?", (("sra-dts-as", "sra"),), "No, they do not."),
        Effect("Unclaimed", "And against nothing?", (("sra", "sit"),)),
    ),
)


def result(
    variant: str,
    seed: int = 0,
    fraction: float = 1.0,
    *,
    metrics: Mapping[str, float] | None = None,
    **fields: Any,
) -> RunResult:
    """A finished run of which little matters."""
    known: dict[str, Any] = {
        "folder": f"{RUNS}/{variant}/seed_{seed}",
        "config": {},
        "parameters": 1000,
        "flops_per_step": 2e9,
        "seconds_per_step": 0.5,
        "seconds": 200.0,
        "heldout_by_timestep": (),
    }
    return RunResult(variant, seed, fraction, metrics=dict(metrics or {}), **{**known, **fields})


def write_synthetic_study(
    folder: Path,
    *,
    grid: Grid = GRID,
    seeds: tuple[int, ...] = (0, 1, 2),
    fractions: tuple[float, ...] = (1.0,),
    metrics: tuple[str, ...] = ("heldout_loss", "fd_classifier", "class_consistency"),
    settings: Mapping[str, Any] = SETTINGS,
    keep: Callable[[str, int], bool] = lambda variant, seed: True,
    registered: bool = True,
) -> Study:
    """A study's folder: a variant is better the later it stands in the grid, with noise of the seed.

    Runs that are not kept fail at the first seed, and are waited for at the others.
    """
    registration = register(grid, "fd_classifier", len(seeds)) if registered else None
    study = Study(grid, settings, seeds, fractions, Measurement(num=40), "laptop", registration)
    write_study(folder, study)
    generator = np.random.default_rng(0)
    luck = {seed: generator.normal(0, 0.02) for seed in seeds}
    place = {name: k for k, name in enumerate(grid.variants)}
    for job in study.jobs():
        run = folder / RUNS / job.name
        run.mkdir(parents=True)
        if not keep(job.variant, job.seed):
            run.rmdir()
            if job.seed == seeds[0]:
                mark = run.with_suffix(FAILED_SUFFIX)
                mark.write_text("ValueError: <b>no</b> & nothing\n")
            continue
        loss = 0.5 - 0.01 * place[job.variant] + luck[job.seed] + generator.normal(0, 0.002)
        values = dict.fromkeys(metrics, 3 * loss) | {"class_consistency": 1.2 - loss}
        curve = [(step, loss * (1 + 40 / step)) for step in (100, 200, 300, 400)]
        write_result(
            run,
            result(
                job.variant,
                job.seed,
                job.train_fraction,
                folder=f"{RUNS}/{job.name}",
                metrics={name: values[name] for name in metrics},
                heldout_by_timestep=[loss + generator.normal(0, 0.01) for _ in range(10)],
                curves=dict.fromkeys(metrics[:2], curve),
                versions={"torch": "2.9"},
                heldout_images={"fd_classifier": 1.1},
            ),
        )
        samples = run / "evaluation" / "step_00000400-ema-0" / "samples.npz"
        samples.parent.mkdir(parents=True)
        images = generator.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
        np.savez(samples, arr_0=images, arr_1=np.arange(40) % 10)
    return study

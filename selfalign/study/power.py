"""What a study can find, before it runs, from the spread that an earlier one had."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from selfalign.errors import UserError
from selfalign.records import convert, read_plain
from selfalign.study.estimates import Layout
from selfalign.study.grid import Grid
from selfalign.study.parsing import require_measurable
from selfalign.study.plan import Registration
from selfalign.study.results import METRICS
from selfalign.study.verdicts import (
    chance_of_equal,
    margin_weights,
    smallest_detectable,
    unit_error,
)


@dataclass(frozen=True)
class Pilot:
    """An earlier study: what its variant and seed left unexplained."""

    layouts: Mapping[str, Layout]
    """By metric."""


@dataclass(frozen=True)
class PowerRow:
    """What one headline test can find."""

    effect: str
    metric: str
    expected: str
    residual: float
    """Standard deviation of what variant and seed leave unexplained, in the earlier study."""
    level: float
    """Mean of the metric, in the earlier study."""
    detectable: float
    """The smallest effect that is found with a chance of 80 %, at 5 % over all headline tests."""
    margin: float | None
    """None where the earlier study cannot tell: half of an effect that was none, or lacks its variants."""
    chance: float | None
    """Of finding that there is no gain, or no difference, where there is none."""


class _Mean(msgspec.Struct):
    by_seed: dict[int, float]


class _Numbers(msgspec.Struct):
    means: dict[str, dict[str, _Mean]]


def read_pilot(folder: Path) -> Pilot:
    """The layouts of an earlier study, of any version, from its report.json.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(
            f"--like is {str(folder)!r}: must be a study's folder with a report.json; "
            "`selfalign study report` writes it"
        )
    numbers = convert(read_plain(path, finite=False), _Numbers, f"{path} cannot be read")
    layouts: dict[str, dict[Any, float]] = {}
    for variant, metrics in numbers.means.items():
        for metric, mean in metrics.items():
            require_measurable(mean.by_seed.values(), f"means.{variant}.{metric}", path)
            for seed, value in mean.by_seed.items():
                layouts.setdefault(metric, {})[variant, seed] = value
    found = {metric: Layout(values) for metric, values in layouts.items() if metric in METRICS}
    if not any(layout.residual[1] and layout.residual[0] for layout in found.values()):
        raise UserError(f"{path}: needed are two variants and two seeds, which show a spread")
    return Pilot(found)


def power(grid: Grid, registration: Registration, pilot: Pilot, seeds: int) -> list[PowerRow]:
    """What each headline test of a grid can find with so many seeds.

    Args:
        grid: that is to run.
        registration: its tests.
        pilot: tells the spread, the level, and the margins.
        seeds: how many are planned.

    Raises:
        UserError: too few seeds or variants for any interval.
    """
    effects = [effect for effect in grid.effects if effect.title in registration.effects]
    if len(grid.variants) < 2 or any(grid.judging(effect, seeds) < 2 for effect in effects):
        raise UserError("needed are two variants and two seeds: one of either shows no spread")
    rows = []
    per_test = registration.level / (len(registration.effects) * len(registration.metrics))
    for effect in effects:
        judging = grid.judging(effect, seeds)
        degrees = (len(grid.pool(effect)) - 1) * (judging - 1)
        for metric in registration.metrics:
            layout = pilot.layouts.get(metric)
            if layout is None or not layout.residual[0]:
                continue
            residual = layout.residual[0] ** 0.5
            error = residual * unit_error(effect.weights, judging)
            weights = margin_weights(effect, metric, grid.effects, registration)
            known = layout.weigh(weights) if weights else None
            margin = known.mean if known and known.mean > 0 else None
            chance = None
            if margin is not None and effect.expected != "gain":
                small, equal = chance_of_equal(margin, error, degrees, per_test)
                chance = small if effect.expected == "no gain" else equal
            level = sum(layout.values.values()) / len(layout.values)
            detectable = smallest_detectable(error, degrees, per_test)
            rows.append(
                PowerRow(
                    effect.title,
                    metric,
                    effect.expected,
                    residual,
                    level,
                    detectable,
                    margin,
                    chance,
                )
            )
    if not rows:
        raise UserError("the earlier study has none of the metrics that are tested")
    return rows

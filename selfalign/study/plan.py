"""A study from its grid to the list of its runs, each with its resolved settings."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import selfalign
from selfalign.config import RunConfig, resolve
from selfalign.data import open_data
from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.recipes import recipe
from selfalign.sampling.generate import SamplingConfig
from selfalign.study.grid import Grid, grid_from_dict

STUDY_FILE = "study.json"
_GROWING = ("seeds", "train_fractions")
"""What may grow between two sittings of one study."""


@dataclass(frozen=True)
class Measurement:
    """How every run is measured, while it trains and at its end."""

    num: int = 1000
    """Samples for the Fréchet distance and the other metrics of samples."""
    features: str | None = None
    """Feature network of `selfalign evaluate`; left out: the data set's classifier where it is
    small, else inception."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(solver="heun"))
    """How samples are made: the same noise and labels in every run."""


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    name: str
    """Its folder below the study's `runs`."""
    variant: str
    seed: int
    train_fraction: float
    config: RunConfig
    """What is left open in it, the data determines."""


@dataclass(frozen=True)
class Study:
    """A grid of variants × train fractions × seeds, in which all else is the same."""

    grid: Grid
    settings: Mapping[str, Any]
    """Fields that all runs share, by dotted name; a variant's own come after them."""
    seeds: tuple[int, ...]
    train_fractions: tuple[float, ...] = (1.0,)
    measurement: Measurement = field(default_factory=Measurement)
    profile: str = ""
    """Where the settings come from, in a word."""

    def __post_init__(self) -> None:
        for name in _GROWING:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} is {values}: needed are one or more different numbers")

    def jobs(self) -> list[Job]:
        """Every run, seed by seed, so that whole replications finish first."""
        return [
            self._job(name, seed, fraction)
            for seed in self.seeds
            for fraction in self.train_fractions
            for name in self.grid.variants
        ]

    def _job(self, name: str, seed: int, fraction: float) -> Job:
        variant = self.grid.variants[name]
        settings = {**self.settings, "data.train_fraction": fraction, **variant.settings}
        config = recipe(variant.recipe, {**settings, "seed": seed})
        folder = name if fraction == 1 else f"{name}_data{fraction:g}"
        return Job(f"{folder}/seed_{seed}", name, seed, fraction, config)

    def check(self) -> None:
        """Refuse a study of which a run could not start.

        Raises:
            UserError: the data is missing, or a variant's settings do not fit it.
        """
        for fraction in self.train_fractions:
            source = None
            for name in self.grid.variants:
                try:
                    config = self._job(name, self.seeds[0], fraction).config
                    source = source or open_data(config.data)
                    resolve(config, source.channels, source.image_size, source.num_classes)
                except UserError as error:
                    raise UserError(f"variant {name}: {error}") from error

    @property
    def full_fraction(self) -> float:
        """The largest share of the training data: what tables and effects are of."""
        return max(self.train_fractions)


def write_study(folder: Path, study: Study) -> None:
    """Write study.json into a new folder, or into that of the same study with fewer seeds.

    Raises:
        UserError: the folder holds another study, or something else.
    """
    path = folder / STUDY_FILE
    if path.is_file():
        known = _as_json(read_study(folder))
        new = _as_json(study)
        for name in known:
            if name not in _GROWING and known[name] != new[name]:
                raise UserError(
                    f"{folder} holds a study with other {name}: choose another --out, or repeat its "
                    "command to go on with it"
                )
        for name in _GROWING:
            if missing := [value for value in known[name] if value not in new[name]]:
                raise UserError(f"{folder} holds a study whose {name} have {missing} besides")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out is {str(folder)!r}: must be a new or an empty folder, or a study's")
    record = {"selfalign_version": selfalign.__version__, **_as_json(study)}
    text = json.dumps(record, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))


def read_study(folder: Path) -> Study:
    """The study of a folder.

    Raises:
        UserError: there is none, or its study.json is damaged.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is not a study: it holds no {STUDY_FILE}")
    try:
        record = json.loads(path.read_text())
        record.pop("selfalign_version")
        measurement = record["measurement"]
        sampling: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in measurement["sampling"].items()
        }
        return Study(
            **{
                **record,
                "grid": grid_from_dict(record["grid"]),
                "seeds": tuple(record["seeds"]),
                "train_fractions": tuple(record["train_fractions"]),
                "measurement": Measurement(
                    **{**measurement, "sampling": SamplingConfig(**sampling)}
                ),
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _as_json(study: Study) -> dict[str, Any]:
    """The study as JSON holds it: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(study)))

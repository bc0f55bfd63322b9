"""A study from its grid to the list of its runs, each with its resolved settings."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import selfalign
from selfalign.config import RunConfig, complete, resolve
from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.parts import require_named_plugins
from selfalign.recipes import recipe
from selfalign.records import read_plain
from selfalign.study.grid import Grid, grid_from_dict
from selfalign.study.parsing import checked
from selfalign.study.settings import MAX_SEEDS, Measurement

STUDY_FILE = "study.json"
_GROWING = ("seeds", "train_fractions")
"""What may grow between two sittings of one study."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,79}")
"""Names that any file system takes as they are."""


def folder_name(name: str) -> str:
    """A variant's name as a folder's: itself where it is plain, else what is plain in it and a hash."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    plain = "-".join(re.findall(r"[A-Za-z0-9._=+]+", name))[:40].strip("._=+-")
    return f"{plain or 'variant'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Registration:
    """What was laid down before anything ran: the tests that count, and below which size a gain is none."""

    effects: tuple[str, ...]
    """Titles of the effects that are tested."""
    metrics: tuple[str, ...]
    """On which of METRICS each is tested."""
    margins: Mapping[str, float]
    """By metric, the margin as a share of the mean that an effect is relative to. An effect that is half
    of another has half of that one's gain instead."""
    level: float
    """Chance of any false verdict among the tests that there is to be at most, in each direction."""
    seeds: int
    """How many were planned."""
    detectable: Mapping[str, float] = field(default_factory=dict)
    """By effect, the smallest that is found with a chance of 80 %, in standard deviations of what variant
    and seed leave unexplained."""

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("level", 0 < self.level < 1, "a chance between 0 and 1"),
            ("seeds", self.seeds >= 1, "a number from 1"),
            ("margins", all(0 < margin < 1 for margin in self.margins.values()), "shares below 1"),
        ):
            if not fits:
                raise UserError(
                    f"registration.{name} is {getattr(self, name)!r}: allowed is {allowed}"
                )


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
    after: "Job | None" = None
    """The run whose last weights this one starts from."""

    @property
    def run(self) -> tuple[RunConfig, ...]:
        """All that makes the run what it is, whatever it is called: its settings, and those before it."""
        return (*(self.after.run if self.after else ()), self.config)


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
    registration: Registration | None = None
    """None: nothing was laid down beforehand, as before version 0.2."""

    def __post_init__(self) -> None:
        require_named_plugins(self.settings.get("plugins", ()))
        for name in _GROWING:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} is {values}: needed are one or more different numbers")
            if len(values) > MAX_SEEDS:
                raise UserError(f"{name} are {len(values):,}: allowed are up to {MAX_SEEDS:,}")
        titles = {effect.title for effect in self.grid.effects}
        if self.registration is not None and (gone := set(self.registration.effects) - titles):
            raise UserError(
                f"registration.effects has {sorted(gone)[0]!r}, which is no effect of the grid: what was "
                "laid down beforehand stays as it is"
            )
        owners: dict[str, str] = {}
        for fraction in self.train_fractions:
            for name in self.grid.variants:
                folder = _run_folder(name, fraction).casefold()  # some file systems ignore case
                if (other := owners.setdefault(folder, name)) != name:
                    raise UserError(
                        f"variants {other!r} and {name!r} would share the folder {folder!r}: rename one"
                    )
        if len(owners) < len(self.train_fractions) * len(self.grid.variants):
            raise UserError(f"train_fractions is {self.train_fractions}: two of them are too close")

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
        after = self._job(variant.after, seed, fraction) if variant.after else None
        folder = f"{_run_folder(name, fraction)}/seed_{seed}"
        return Job(folder, name, seed, fraction, config, after)

    def check(self) -> None:
        """Refuse a study of which a run could not be trained or not be measured.

        Raises:
            UserError: data or weights are missing, or a variant's settings do not fit them.
        """
        import torch

        from selfalign.data.datasets import open_data
        from selfalign.evaluation.classifier import require_classes
        from selfalign.evaluation.features import feature_network
        from selfalign.evaluation.setup import default_features
        from selfalign.sampling.generate import check_sampling
        from selfalign.student import build_student

        networks: set[tuple[str, str]] = set()
        for fraction in self.train_fractions:
            sources: dict[Any, Any] = {}
            for name in self.grid.variants:
                try:
                    config = self._job(name, self.seeds[0], fraction).config
                    source = sources.get(config.data)
                    if source is None:
                        source = sources[config.data] = open_data(config.data)
                    config = resolve(config, source.channels, source.image_size, source.num_classes)
                    config = complete(config, source)
                    with torch.device("meta"):
                        model = build_student(config)
                    sampling, dropout = self.measurement.sampling, config.views.class_dropout
                    check_sampling(model, sampling, dropout, None)
                    features = self.measurement.features or default_features(config.data)
                    if features == "classifier":
                        require_classes(source, config.data.name)
                    elif (features, config.data.name) not in networks:
                        feature_network(features, source, config.data.name)
                        networks.add((features, config.data.name))
                except UserError as error:
                    raise UserError(f"variant {name!r}: {error}") from error

    @property
    def constant_rate(self) -> bool:
        """Whether every run keeps its learning rate once it has warmed up."""
        return all(job.config.training.schedule == "constant" for job in self.jobs())

    @property
    def full_fraction(self) -> float:
        """The largest share of the training data: what tables and effects are of."""
        return max(self.train_fractions)


def _run_folder(variant: str, fraction: float) -> str:
    folder = folder_name(variant)
    return folder if fraction == 1 else f"{folder}_data{fraction:g}"


def write_study(folder: Path, study: Study) -> Study:
    """Write study.json into a new folder, or into that of the same study with fewer seeds.

    Returns:
        The study as it stands now: what an earlier one registered beforehand, or did not, stays.

    Raises:
        UserError: the folder holds another study, or something else.
    """
    path = folder / STUDY_FILE
    if path.is_file():
        earlier = read_study(folder)
        study = dataclasses.replace(study, registration=earlier.registration)
        if _settings_agree(earlier, study):
            earlier = dataclasses.replace(earlier, settings=study.settings)
        known, new = _as_json(earlier), _as_json(study)
        for name in known:
            if name not in _GROWING and known[name] != new[name]:
                raise UserError(
                    f"{folder} holds a study with other {name}{_differing(known[name], new[name])}: "
                    "choose another --out, or repeat its command to go on with it"
                )
        for name in _GROWING:
            if missing := [value for value in known[name] if value not in new[name]]:
                raise UserError(f"{folder} holds a study whose {name} have {missing} besides")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out is {str(folder)!r}: must be a new or an empty folder, or a study's")
    record = {"selfalign_version": selfalign.__version__, **_as_json(study)}
    text = json.dumps(record, indent=1) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))
    return study


def _settings_agree(earlier: Study, study: Study) -> bool:
    """Whether all variants' runs have the same settings, also where only one of the studies names a field.

    An earlier version's study.json does not name what has come since: there its runs have the defaults.
    """
    if _as_json(earlier.grid) != _as_json(study.grid):
        return False
    runs = [
        [each._job(name, study.seeds[0], study.full_fraction).run for name in study.grid.variants]
        for each in (earlier, study)
    ]
    return runs[0] == runs[1]


def _differing(known: object, new: object) -> str:
    """Which fields of a section differ, in brackets."""
    if not isinstance(known, dict) or not isinstance(new, dict):
        return ""
    return f" ({', '.join(k for k in {**known, **new} if known.get(k) != new.get(k))})"


def read_study(folder: Path) -> Study:
    """The study of a folder.

    Raises:
        UserError: there is none, or its study.json is damaged.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise UserError(f"{str(folder)!r} is not a study: it holds no {STUDY_FILE}")
    return study_from_dict(read_plain(path, finite=False), path)


def study_from_dict(record: Any, where: object) -> Study:
    """A study from what study.json holds.

    Raises:
        UserError: it describes none.
    """
    if not isinstance(record, dict) or not isinstance(record.get("grid"), dict):
        raise UserError(f"{where} cannot be read: it describes no study")
    plain = {name: value for name, value in record.items() if name != "selfalign_version"}
    grid = grid_from_dict(plain.pop("grid"), where)
    return checked({**plain, "grid": _as_json(grid)}, Study, where)


def _as_json(value: Any) -> Any:
    """A dataclass as JSON holds it: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(value)))

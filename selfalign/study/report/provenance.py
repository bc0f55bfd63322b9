"""What was run: settings, versions, and the commands that repeat it."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from selfalign.config import RunConfig, config_to_dict, override
from selfalign.pages.settings import Settings, compare, flatten
from selfalign.parts import PartSettings
from selfalign.recipes import recipe
from selfalign.study.grids import GRIDS
from selfalign.study.plan import Job, Study
from selfalign.study.profiles import PROFILES
from selfalign.study.results import RunResult


def settings(jobs: Iterable[Job], runs: Iterable[RunResult]) -> Settings:
    """What all runs share, and what sets the variants apart; seed and train fraction are neither.

    Args:
        jobs: one per variant.
        runs: finished ones, in whose settings nothing is left open.
    """
    resolved = {run.variant: run.config for run in runs}
    trees = {
        job.variant: flatten(resolved.get(job.variant) or config_to_dict(job.config))
        for job in jobs
    }
    for tree in trees.values():
        tree.pop("seed", None)
        tree.pop("data.train_fraction", None)
    return compare(trees)


def versions(runs: Iterable[RunResult]) -> dict[str, str]:
    """Versions that the runs were made with; several of one thing are all named."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for name, version in run.versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: " and ".join(several) for name, several in found.items()}


def _options(values: Mapping[str, Any]) -> list[str]:
    """Options of the command line that set these fields."""
    words: list[str] = []
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        dashed = field.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{section}.{'' if value else 'no-'}{dashed}")
            continue
        words.append(f"--{section}.{dashed}" if section else f"--{dashed}")
        words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def _changed(start: RunConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a tree's settings, by dotted name, that another tree does not have."""

    def at(name: str) -> Any:
        held: Any = start
        for word in name.split("."):  # of parts also those that this tree does not choose
            held = held[word] if isinstance(held, PartSettings) else getattr(held, word)
        return list(held) if isinstance(held, tuple) else held

    return {name: value for name, value in values.items() if value != at(name)}


def train_command(study: Study, job: Job) -> str:
    """The command that repeats one run, whatever made it."""
    name = study.grid.variants[job.variant].recipe
    changed = _changed(recipe(name), flatten(config_to_dict(job.config)))
    out = f"runs/{job.name}"
    if job.after is not None:
        changed["training.start_from"] = f"runs/{job.after.name}"
    return shlex.join(["selfalign", "train", name, "--out", out, *_options(changed)])


def study_command(study: Study) -> str:
    """The command that repeats a study; empty if none does, as its seeds or settings are a script's."""
    profile = PROFILES.get(study.profile)
    if profile is None or study.seeds != tuple(range(len(study.seeds))):
        return ""
    start = override(RunConfig(), profile.settings)
    given = {
        name: list(value) if isinstance(value, tuple | list) else value
        for name, value in study.settings.items()
        if name.startswith(("data.", "flow.", "model.", "training."))
    }
    always = {name: given[name] for name in ("data.name", "model.size") if name in given}
    changed = always | _changed(start, given)
    if study.train_fractions != (1.0,):
        changed["data.train_fraction"] = list(study.train_fractions)
    usual = flatten(asdict(profile.measurement), "measurement.")
    measured = flatten(asdict(study.measurement), "measurement.")
    changed |= {name: value for name, value in measured.items() if value != usual[name]}
    grid = study.grid.name if study.grid.name in GRIDS else f"{study.grid.name}.yaml"
    fixed = ["--out", "OUT", "--profile", study.profile, "--seeds", str(len(study.seeds))]
    return shlex.join(["selfalign", "study", grid, *fixed, *_options(changed)])


def representatives(study: Study) -> Sequence[Job]:
    """One job per variant: the first seed's, with all of the data that is used."""
    return [
        job
        for job in study.jobs()
        if job.seed == study.seeds[0] and job.train_fraction == study.full_fraction
    ]

"""Finished runs of one study that are runs of another as well."""

import dataclasses
import os
import shutil
from pathlib import Path

from selfalign.study.plan import Study
from selfalign.study.results import RUNS, read_result, write_result


def take_over(folder: Path, study: Study, other_folder: Path, other: Study) -> list[str]:
    """Take finished runs of another study into a study's folder, where all of their settings are the same.

    Their files are linked where the file system can, and copied elsewhere.

    Args:
        folder: the study's.
        study: which runs it needs.
        other_folder: of the other study, which stays as it is.
        other: how its runs were made and measured.

    Returns:
        The names of the runs that were taken.
    """
    if study.measurement != other.measurement:
        return []
    there = {job.run: job for job in other.jobs()}
    taken = []
    for job in study.jobs():
        target, found = folder / RUNS / job.name, there.get(job.run)
        result = read_result(other_folder / RUNS / found.name) if found else None
        if found is None or result is None or target.exists():
            continue
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(other_folder / RUNS / found.name, partial, copy_function=_link)
        own = dataclasses.replace(result, variant=job.variant, folder=f"{RUNS}/{job.name}")
        write_result(partial, own)
        partial.rename(target)
        taken.append(job.name)
    return taken


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

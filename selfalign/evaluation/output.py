"""Where an evaluation writes: refused before any work, and written whole."""

import os
from pathlib import Path

from selfalign.disk import real_path, require_writable
from selfalign.errors import UserError
from selfalign.evaluation.generation import PlannedSamples
from selfalign.evaluation.report import Evaluation
from selfalign.evaluation.setup import Setup
from selfalign.records import write_json


def require_place(subject: Path, out: Path | None) -> None:
    """Refuse a place that cannot be written into, before a classifier is trained or anything is read.

    Args:
        subject: what is evaluated; a run's evaluations go into its folder, others beside it.
        out: the place that was named.

    Raises:
        UserError: it cannot.
    """
    if out is not None:
        require_writable(out)
    elif os.path.exists(subject):  # noqa: PTH110 - also of names that no file can have
        whole = real_path(subject)
        require_writable(whole if (whole / "config.json").is_file() else whole.parent)


def report_folder(setup: Setup) -> Path:
    """Where the report goes, refused where it cannot or must not go.

    Raises:
        UserError: a folder that cannot be made or written into, or the place of what is read.
    """
    config, whole = setup.config, real_path(setup.subject)
    samples = setup.samples.folder if isinstance(setup.samples, PlannedSamples) else None
    folder = config.out or samples or whole.with_name(f"{whole.stem or 'samples'}-evaluation")
    require_writable(folder)
    for name in ("evaluation.json", "evaluation.png"):
        if (folder / name).is_dir():
            raise UserError(f"{folder / name} is a folder: --out names another place")
    read = [whole] if samples is None else []
    if config.reference is not None and os.path.exists(config.reference):  # noqa: PTH110
        read.append(real_path(Path(config.reference)))
    for place in read:
        if place.is_dir() and real_path(folder).is_relative_to(place):
            raise UserError(
                f"--out is {str(folder)!r}, within the images of {place}: the picture would be one of "
                "them next time"
            )
        if config.write_reference is not None and real_path(config.write_reference) == place:
            raise UserError(f"--write-reference is {str(place)!r}, which is read from")
    if config.write_reference is not None:
        require_writable(config.write_reference.parent)
        if config.write_reference.is_dir():
            raise UserError(f"--write-reference is {str(config.write_reference)!r}, a folder")
    return folder


def write_evaluation(evaluation: Evaluation) -> None:
    """Write evaluation.json, whole or not at all.

    Raises:
        UserError: the disk is full or not writable.
    """
    write_json(evaluation.folder / "evaluation.json", evaluation.as_json())

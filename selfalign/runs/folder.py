"""A run's folder: what config.json holds, and who may write."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from accelerate import Accelerator

import selfalign
from selfalign.config import RunConfig, config_from_dict, config_to_dict
from selfalign.data.contents import Recorded, read_contents, write_contents
from selfalign.data.source import DataSource
from selfalign.disk import LOCK, is_left_over, locked, remove, sweep
from selfalign.errors import UserError
from selfalign.processes import together
from selfalign.records import read_json, write_json

CHECKPOINTS = "checkpoints"
DATA = "data.json.gz"
"""The list of the data's files, where it is made of files."""
ORIGIN = "imported.json"
"""Where the weights of a run came from, and their licence."""


class ConfigFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`config.json` as it is written."""

    selfalign_version: str
    data_fingerprint: str
    class_names: tuple[str, ...]
    config: dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run was started with."""

    config: RunConfig
    """Resolved."""
    fingerprint: str
    """Of its data."""
    class_names: tuple[str, ...]
    """By label; empty for data without classes."""


def write_config(folder: Path, config: RunConfig, source: DataSource) -> None:
    """Write config.json: the resolved tree, the package's version and the data's fingerprint.

    Beside it goes the list of the data's files, where it is made of files.
    """
    if source.contents is not None:
        write_contents(folder / DATA, source.contents)
    write_record(folder, config, source.fingerprint, source.class_names)


def write_record(
    folder: Path, config: RunConfig, fingerprint: str, class_names: Sequence[str]
) -> None:
    """Write config.json. Arguments as the fields of `RunRecord`."""
    names = tuple(class_names)
    file = ConfigFile(selfalign.__version__, fingerprint, names, config_to_dict(config))
    write_json(folder / "config.json", file)


def read_record(folder: Path) -> RunRecord:
    """What a run was started with.

    Raises:
        UserError: the folder is not a run, or its config.json is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{str(folder)!r} is not a run: it holds no config.json")
    file = read_json(path, ConfigFile)
    try:
        config = config_from_dict(file.config)
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return RunRecord(config, file.data_fingerprint, file.class_names)


class _Origin(msgspec.Struct):
    """`imported.json`."""

    file: str
    sha256: str
    from_: str = msgspec.field(name="from")
    licence: str = ""
    selfalign_version: str = ""


def read_origin(folder: Path) -> dict[str, Any]:
    """Where a run's weights came from: those of an import, or of what it was started from; {} if nowhere."""
    path = folder / ORIGIN
    return msgspec.to_builtins(read_json(path, _Origin)) if os.path.lexists(path) else {}


def inherit_origin(start: str | None, folder: Path) -> None:
    """Keep with a run where the weights that it starts from came from: their licence goes with them.

    Args:
        start: the run or file that it starts from; None: from none.
        folder: of the run.
    """
    if start is not None and (origin := read_origin(Path(start))):
        write_json(folder / ORIGIN, origin)


def recorded_data(folder: Path, fingerprint: str) -> Recorded:
    """Of which data a run was made when it began; version 0.1.0 did not list the files."""
    path = folder / DATA
    return Recorded(fingerprint, read_contents(path) if path.exists() else None)


def refuse_used(folder: Path) -> None:
    """Refuse a folder that a new run cannot have.

    Raises:
        UserError: it holds a run, or anything else.
    """
    if (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds a run already: choose another --out, or go on with "
            f"`selfalign train --resume {folder}`"
        )
    # Neither a lock nor a half-written file, of a process that was killed, is anybody's.
    if folder.exists() and not (
        folder.is_dir() and all(p.name == LOCK or is_left_over(p) for p in folder.iterdir())
    ):
        raise UserError(f"--out is {str(folder)!r}: must be a new or an empty folder")


@contextmanager
def sole_writer(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold a run's folder, which is made if it is missing, so that no other job writes into it.

    What a job leaves behind that is killed is no obstacle.

    Raises:
        UserError: another job holds it, or it is not writable.
    """
    with contextlib.ExitStack() as held:
        with together(accelerator):
            if accelerator.is_main_process:
                held.enter_context(locked(folder, "is in use: another process trains this run"))
                sweep(folder)
                sweep(folder / CHECKPOINTS)
        yield


def missing_folders(folder: Path) -> list[Path]:
    """Those of a folder and its parents that do not exist yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def empty(folder: Path) -> None:
    """Remove what is in the folder of a run that has not made a step."""
    for path in folder.iterdir():
        remove(path)


def remove_empty(folders: list[Path]) -> None:
    """Remove those folders, in this order, in which nothing is."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()

"""Files and folders that are there whole, or not at all, and where those that can be made again are kept."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfalign.errors import UserError


def publish(partial: Path, path: Path) -> None:
    """Rename a file, or a folder of files, once all of it is on the disk."""
    contents = list(partial.iterdir()) if partial.is_dir() else []
    for written in (*contents, partial):
        _flush_to_disk(written)
    partial.replace(path)
    _flush_to_disk(path.parent)  # the new name, too, has to survive a power failure


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(kind: str) -> Path:
    """The folder `kind` in `$SELFALIGN_CACHE`, or in `~/.cache/selfalign`."""
    root = os.environ.get("SELFALIGN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "selfalign") / kind


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it, so that it is whole or absent.

    Args:
        path: the file.
        write: writes it, under the name that it is given.

    Raises:
        UserError: the disk is full or not writable.
    """
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a `.npz`, whole or not at all. Raises UserError as `write_whole` does."""
    write_whole(path, lambda partial: np.savez(partial, allow_pickle=False, **arrays))

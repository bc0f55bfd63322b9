"""Files and folders that are there whole, or not at all."""

import os
from pathlib import Path


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

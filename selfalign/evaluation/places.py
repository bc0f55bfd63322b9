"""Whether a folder can be written into, asked before any work is done."""

import os
from pathlib import Path

from selfalign.errors import UserError


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written into, or made. Makes nothing.

    Raises:
        UserError: it cannot.
    """
    place = existing(folder)
    if not place.is_dir():
        raise UserError(f"{folder} cannot be written into: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder} cannot be written into: {place} is read-only; --out names another place"
        )


def existing(folder: Path) -> Path:
    """The folder itself, or what is there of the way to it."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if os.path.lexists(place))

"""Where downloaded weights, classifiers and reference statistics are kept, and arrays written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfalign.disk import write_whole


def cache_folder(kind: str) -> Path:
    """The folder `kind` in `$SELFALIGN_CACHE`, or in `~/.cache/selfalign`."""
    root = os.environ.get("SELFALIGN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "selfalign") / kind


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a `.npz`, whole or not at all. Raises UserError as `write_whole` does."""
    write_whole(path, lambda partial: np.savez(partial, allow_pickle=False, **arrays))

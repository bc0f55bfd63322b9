"""Arrays written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfalign.disk import write_whole


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a `.npz`, whole or not at all. Raises UserError as `write_whole` does."""
    write_whole(path, lambda partial: np.savez(partial, allow_pickle=False, **arrays))

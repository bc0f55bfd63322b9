"""Handwritten digits of scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from selfalign.data.sources import Source
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Float32
    from numpy import ndarray

    from selfalign.data.source import DataSource
    from selfalign.sections import DataConfig


@register("digits")
@dataclass(frozen=True)
class Digits(Source):
    """1,797 grey images of 8×8 pixels, of which 400 are held out; they come with scikit-learn."""

    small = True

    def open(self, config: DataConfig) -> DataSource:
        """The first 400 of an order that never changes are held out."""
        import torch

        from selfalign.data.datasets import HELDOUT_SEED, in_memory

        rows = torch.from_numpy(_read_digits())
        images, labels = rows[:, :64].reshape(-1, 1, 8, 8) / 8 - 1, rows[:, 64].long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(HELDOUT_SEED))
        images, labels = images[order], labels[order]
        train, heldout = (images[400:], labels[400:]), (images[:400], labels[:400])
        return in_memory(config, *train, *heldout, "0123456789")


def _read_digits() -> Float32[ndarray, "1797 65"]:
    """Pixels from 0 to 16 and the label of each image, from the file in scikit-learn's package.

    `sklearn.datasets.load_digits` returns the same; its import takes as long as the first steps of a
    run, for scipy.stats and pandas come with it.
    """
    import gzip

    import numpy as np

    package = find_spec("sklearn")
    assert package is not None and package.origin is not None, "selfalign requires scikit-learn"
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(file) as lines:
        return np.loadtxt(lines, dtype=np.float32, delimiter=",")

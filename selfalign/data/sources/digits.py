"""Handwritten digits of scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.data.sources import Source
from selfalign.parts import register

if TYPE_CHECKING:
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
        from sklearn.datasets import load_digits

        from selfalign.data.datasets import HELDOUT_SEED, in_memory

        digits = load_digits()
        images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.as_tensor(digits.target, dtype=torch.int64)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(HELDOUT_SEED))
        images, labels = images[order], labels[order]
        train, heldout = (images[400:], labels[400:]), (images[:400], labels[:400])
        return in_memory(config, *train, *heldout, "0123456789")

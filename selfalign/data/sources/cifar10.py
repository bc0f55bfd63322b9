"""CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.data.sources import Source
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.data.source import DataSource
    from selfalign.sections import DataConfig

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@register("cifar10")
@dataclass(frozen=True)
class Cifar10(Source):
    """60,000 colour images of 32×32 pixels, in the archive of its authors."""

    def open(self, config: DataConfig) -> DataSource:
        """Its test images are held out."""
        from pathlib import Path

        from selfalign.data.datasets import in_memory
        from selfalign.data.files import read_cifar10

        return in_memory(config, *read_cifar10(Path(config.root)), CLASSES)

"""Fashion-MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.data.sources import Source
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.data.source import DataSource
    from selfalign.sections import DataConfig

CLASSES = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
]


@register("fashion-mnist")
@dataclass(frozen=True)
class FashionMnist(Source):
    """70,000 grey images of clothes, 28×28 pixels; also found where Debian installs them."""

    small = True

    def open(self, config: DataConfig) -> DataSource:
        """Its test images are held out."""
        from pathlib import Path

        from selfalign.data.datasets import in_memory
        from selfalign.data.files import read_mnist

        return in_memory(config, *read_mnist(Path(config.root), "fashion-mnist"), CLASSES)

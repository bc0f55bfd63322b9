"""Images that the tests of data share."""

from pathlib import Path

import numpy as np
from PIL import Image

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the original files."""


def random_image(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    """Smooth colours, different for every seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def make_images(root: Path, count: int, side: int = 8) -> Path:
    """A folder of two classes with `count` images each."""
    for label, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            random_image(100 * label + i, side, side).save(root / name / f"{i:03d}.png")
    return root

"""Data sets of torchvision, by name."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from selfalign.data.latents.sources.source import Source, fingerprint_sample, numbered_classes
from selfalign.errors import UserError
from selfalign.names import printable


@dataclass(frozen=True)
class _TorchvisionImages:
    dataset: Any

    def __call__(self, index: int) -> Image.Image:
        return self.dataset[index][0]


def open_torchvision(name: str) -> Source:
    """A set's default split.

    Args:
        name: `NAME[:FOLDER]`, as torchvision.datasets spells it, and where it is or is downloaded to.

    Raises:
        UserError: there is no such set, or torchvision cannot open it.
    """
    import torchvision

    name, _, root = name.partition(":")
    maker = getattr(torchvision.datasets, name, None)
    if name not in torchvision.datasets.__all__ or maker is None:
        raise UserError(
            f"torchvision has no data set {name!r}: allowed are names such as CIFAR10, SVHN, "
            "Flowers102, as torchvision.datasets spells them"
        )
    try:
        dataset = maker(root or "data", download=True)
        images = len(dataset)
        labels = _labels(dataset, images)
    except Exception as error:  # downloads, archives and constructors fail in many ways
        raise UserError(
            f"torchvision's {name} cannot be opened in {root or 'data'!r}: {printable(str(error))}"
        ) from error
    class_names = tuple(map(printable, map(str, getattr(dataset, "classes", ()))))
    if len(class_names) <= labels.max(initial=-1):
        class_names = numbered_classes(labels, f"torchvision's {name}")
    load = _TorchvisionImages(dataset)
    return Source(
        [f"image {index}" for index in range(images)],
        labels.astype(np.int32),
        class_names,
        fingerprint_sample(labels, lambda index: load(index).tobytes()),
        load,
    )


def _labels(dataset: Any, images: int) -> np.ndarray:
    """The labels, under whichever attribute; without decoding the images where there is one."""
    for attribute in ("targets", "labels", "_labels"):
        labels = np.asarray(getattr(dataset, attribute, ()))
        if labels.shape == (images,) and labels.dtype.kind in "iu":
            return labels.astype(np.int32)
    return np.array([int(dataset[index][1]) for index in range(images)], np.int32)

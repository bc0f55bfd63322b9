"""The original files of MNIST, Fashion-MNIST and CIFAR-10, gzipped or not.

They are looked for below `data.root`; what is missing is downloaded there by torchvision.
"""

import gzip
import io
import math
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision
from torch import Tensor

from selfalign.errors import UserError

Splits = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images and labels of the training split, then of the held-out split."""


def read_mnist(root: Path, name: str) -> Splits:
    """MNIST or Fashion-MNIST from its four IDX files, as uint8 (M, 1, 28, 28)."""
    names = [
        f"{split}-{kind}-ubyte"
        for split in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    dataset = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
    folders = (root, root / name, root / dataset / "raw")
    paths = _locate(
        name,
        root,
        names,
        folders,
        lambda: getattr(torchvision.datasets, dataset)(root, download=True),
    )
    images, labels, heldout_images, heldout_labels = (
        _read_idx(path, dimensions=3 if "images" in path.name else 1) for path in paths
    )
    for pixels, classes, path in (
        (images, labels, paths[0]),
        (heldout_images, heldout_labels, paths[2]),
    ):
        if len(pixels) != len(classes):
            raise UserError(f"{path} holds {len(pixels)} images and its labels {len(classes)}")
        _check_labels(path, classes)
    if images.shape[1:] != heldout_images.shape[1:]:
        raise UserError(
            f"{paths[2]} holds images of {tuple(heldout_images.shape[1:])}, but {paths[0]} of "
            f"{tuple(images.shape[1:])}"
        )
    return images[:, None], labels.long(), heldout_images[:, None], heldout_labels.long()


def read_cifar10(root: Path) -> Splits:
    """CIFAR-10 from its six Python batches, as uint8 (M, 3, 32, 32)."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    folders = (root, root / "cifar10", root / "cifar-10-batches-py")
    paths = _locate(
        "cifar10", root, names, folders, lambda: torchvision.datasets.CIFAR10(root, download=True)
    )
    batches = [_read_cifar_batch(path) for path in paths]
    images = torch.cat([batch[0] for batch in batches[:5]])
    labels = torch.cat([batch[1] for batch in batches[:5]])
    return images, labels, *batches[5]


def _check_labels(path: Path, labels: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > 9:
        raise UserError(f"the labels of {path} go from {low} to {high}: allowed are 0 to 9")


def _locate(
    name: str,
    root: Path,
    names: list[str],
    folders: tuple[Path, ...],
    download: Callable[[], object],
) -> list[Path]:
    found = _find(names, folders)
    if found is None:
        root_is_new = not root.exists()
        try:
            download()
        except Exception as error:
            if root_is_new:  # the attempt made it, and nothing in it is whole
                shutil.rmtree(root, ignore_errors=True)
            raise UserError(
                f"data set {name} is not in data.root {str(root)!r} (looked for {names[0]}, with or "
                f"without .gz) and could not be downloaded ({type(error).__name__})"
            ) from error
        found = _find(names, folders)
    if found is None:
        raise UserError(f"data set {name}: the download into {str(root)!r} lacks {names[0]}")
    return found


def _find(names: list[str], folders: tuple[Path, ...]) -> list[Path] | None:
    for folder in folders:
        paths = []
        for name in names:
            candidates = [folder / name, folder / f"{name}.gz"]
            paths += [path for path in candidates if path.is_file()][:1]
        if len(paths) == len(names):
            return paths
    return None


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_idx(path: Path, dimensions: int) -> Tensor:
    content = _read_bytes(path)
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} is not an IDX file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).tolist()
    promised = math.prod(shape)  # in Python's integers, which do not overflow
    if len(content) - header != promised or not promised:
        raise UserError(
            f"{path} is damaged or empty: its header promises {promised} bytes, it holds "
            f"{len(content) - header}"
        )
    values = np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
    return torch.from_numpy(values.copy())


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays and plain containers, and nothing that can run code."""

    allowed: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    content = io.BytesIO(_read_bytes(path))
    try:
        batch = _ArrayUnpickler(content, encoding="bytes").load()
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(batch[b"labels"], dtype=np.int64)
    except Exception as error:
        raise UserError(f"{path} is not a CIFAR-10 batch: {error}") from error
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{path} holds {len(images)} images and {len(labels)} labels")
    classes = torch.from_numpy(labels)
    _check_labels(path, classes)
    return torch.from_numpy(images.copy()), classes

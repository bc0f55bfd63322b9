"""The original files of MNIST, Fashion-MNIST and CIFAR-10, gzipped or not.

They are looked for below `data.root`; what is missing is downloaded there by torchvision.
"""

import contextlib
import gzip
import io
import math
import pickle
import pickletools
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from selfalign.errors import UserError
from selfalign.names import printable

MAX_BYTES = 2**30
"""Of an unpacked file of MNIST's kind, whose largest has 47 million."""
MAX_BATCH_BYTES = 2**26
"""Of an unpacked batch of CIFAR-10, which has 31 million."""
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
    paths = _locate(name, root, names, dataset, ("", name, f"{dataset}/raw"))
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
    paths = _locate("cifar10", root, names, "CIFAR10", ("", "cifar10", "cifar-10-batches-py"))
    batches = [_read_cifar_batch(path) for path in paths]
    images = torch.cat([batch[0] for batch in batches[:5]])
    labels = torch.cat([batch[1] for batch in batches[:5]])
    return images, labels, *batches[5]


def _check_labels(path: Path, labels: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > 9:
        raise UserError(f"the labels of {path} go from {low} to {high}: allowed are 0 to 9")


def _locate(
    name: str, root: Path, names: list[str], dataset: str, folders: tuple[str, ...]
) -> list[Path]:
    """The files in one of the folders below `root`, downloaded into it if they are in none."""
    places = [root / folder for folder in folders]
    found = _find(names, places)
    if found is None:
        _download(name, root, names[0], dataset)
        found = _find(names, places)
    if found is None:
        raise UserError(f"data set {name}: the download into {str(root)!r} lacks {names[0]}")
    return found


def _download(name: str, root: Path, example: str, dataset: str) -> None:
    """Let torchvision download a set beside its place, and move it there when it is whole."""
    import torchvision

    root_is_new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as partial:
            getattr(torchvision.datasets, dataset)(partial, download=True)
            for entry in Path(partial).iterdir():
                if (root / entry.name).is_dir():
                    shutil.rmtree(root / entry.name)  # not all of it, or it would have been found
                entry.replace(root / entry.name)
    except Exception as error:  # downloads fail in many ways
        if root_is_new:
            with contextlib.suppress(OSError):
                root.rmdir()
        reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        raise UserError(
            f"data set {name} is not in data.root {str(root)!r} (looked for {example}, with or "
            f"without .gz) and could not be downloaded ({reason})"
        ) from error


def _find(names: list[str], folders: list[Path]) -> list[Path] | None:
    for folder in folders:
        paths = []
        for name in names:
            candidates = [folder / name, folder / f"{name}.gz"]
            paths += [path for path in candidates if path.is_file()][:1]
        if len(paths) == len(names):
            return paths
    return None


def _read_bytes(path: Path, limit: int) -> bytes:
    """The unpacked content of a file, and no more of it than the limit and one byte."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_idx(path: Path, dimensions: int) -> Tensor:
    header = 4 + 4 * dimensions
    start = _read_bytes(path, header)[:header]
    if len(start) < header or start[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} is not an IDX file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(start, dtype=">u4", offset=4).tolist()
    promised = math.prod(shape)  # in Python's integers, which do not overflow
    if promised > MAX_BYTES:
        raise UserError(f"{path} is damaged: its header promises {promised:,} bytes")
    content = _read_bytes(path, header + promised)
    if len(content) - header != promised or not promised:
        more = "more than that" if len(content) - header > promised else len(content) - header
        raise UserError(
            f"{path} is damaged or empty: its header promises {promised} bytes, it holds {more}"
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


def _unpickle(content: bytes) -> Any:
    """What a pickle of arrays and plain containers holds.

    Raises:
        Exception: it holds something else, or is damaged.
    """
    for opcode, argument, _ in pickletools.genops(content):
        # The unpickler's memo grows to the largest number that it is told.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError(f"{opcode.name} {argument}")
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


def _read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    content = _read_bytes(path, MAX_BATCH_BYTES)
    try:
        if len(content) > MAX_BATCH_BYTES:
            raise ValueError(f"it holds more than {MAX_BATCH_BYTES:,} bytes")
        batch = _unpickle(content)
        images, classes = batch[b"data"], batch[b"labels"]
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            raise ValueError("its data is no array of bytes")
        if images.nbytes > len(content) or not all(type(label) is int for label in classes):
            raise ValueError("its data is larger than the file, or its labels are no numbers")
        images = images.reshape(-1, 3, 32, 32)
        labels = np.asarray(classes, dtype=np.int64)
    except Exception as error:
        raise UserError(f"{path} is not a CIFAR-10 batch: {printable(str(error))}") from error
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{path} holds {len(images)} images and {len(labels)} labels")
    tensor = torch.from_numpy(labels)
    _check_labels(path, tensor)
    return torch.from_numpy(images.copy()), tensor

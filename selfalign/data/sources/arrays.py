"""Signals, images and videos from a file of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from selfalign.data.sources import Source
from selfalign.errors import UserError
from selfalign.parts import register

if TYPE_CHECKING:
    from torch import Tensor

    from selfalign.arrays import Array
    from selfalign.data.source import DataSource
    from selfalign.sections import DataConfig

SAMPLES = ("samples", "x", "images", "signals", "videos", "arr_0")
LABELS = ("labels", "y", "arr_1")
CAPTIONS = ("captions", "texts")
"""Names under which arrays are looked for where none is given."""
LONGEST_NUMBER = 1000
"""Digits of a label that is taken for a number."""
LARGEST = 1e30
"""Value of a sample, so that what is computed with it stays finite."""
SHAPES = "(M, C, L) signals, (M, C, H, W) images or (M, C, T, H, W) videos"


@register("arrays")
@dataclass(frozen=True)
class Arrays(Source):
    """A .npz, .npy or .h5 file of signals (M, C, L), images (M, C, H, W) or videos (M, C, T, H, W).

    `data.root` is the file. Bytes stand for numbers from -1 to 1; floats beyond that are scaled to it, per
    channel, by the training samples' extremes.
    """

    small = True

    samples: str = ""
    """Name of the array of samples; left out: samples, x, images, signals, videos or arr_0."""
    labels: str = ""
    """Name of the labels, whole numbers or words, which then win over captions; left out: labels, y or arr_1,
    where there is one."""
    captions: str = ""
    """Name of the captions, which are told to the model by --model.condition text; left out: captions or
    texts, where there is one."""
    lengths: str = ""
    """Name of the samples' lengths, where they end early along their first side; the rest is left out."""
    channels_last: bool = False
    """Whether samples have their channels last, as in (M, H, W, C)."""
    heldout: float = 0.1
    """Share of the samples that is held out, at random but always the same."""

    def check(self) -> None:
        """Limits of the numbers, and one kind of words."""
        self.require(
            not (self.labels and self.captions),
            "labels",
            "allowed are labels or captions, not both",
        )
        self.require(0 < self.heldout < 1, "heldout", "allowed is a share above 0, below 1")

    @property
    def padded(self) -> bool:
        """Where lengths are named."""
        return bool(self.lengths)

    def open(self, config: DataConfig) -> DataSource:
        """The two splits; the classes are the labels, or the captions, in alphabetical order."""
        import torch

        from selfalign.data.datasets import HELDOUT_SEED, in_memory

        path = Path(config.root)
        arrays = _read(path)
        samples = self._samples(arrays, path)
        words = self._words(arrays, path, len(samples))
        if config.flip and samples.ndim != 4:
            raise UserError("data.flip is True: allowed for images, whose left and right it swaps")
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(HELDOUT_SEED))
        held = max(1, round(self.heldout * len(samples)))
        leaves = f"leaves none of the {len(samples)} samples of {path} to train on"
        self.require(held < len(samples), "heldout", leaves)
        train, heldout = order[held:].sort().values, order[:held].sort().values
        names = sorted(set(words), key=_as_number)
        number = {name: label for label, name in enumerate(names)}
        labels = torch.tensor([number[word] for word in words] or [0] * len(samples))
        beyond = self._beyond(samples, arrays, path) if self.lengths else None
        if beyond is not None:  # whatever stands there, it has no say in how samples are scaled
            samples = torch.where(beyond, samples[:, :, :1], samples)
        scaled = _scaled(samples, train, path)
        if beyond is not None:
            scaled = scaled.masked_fill(beyond, torch.nan)
        return in_memory(
            config, scaled[train], labels[train], scaled[heldout], labels[heldout], names
        )

    def _samples(self, arrays: Mapping[str, Array], path: Path) -> Tensor:
        """The array of samples, channels first."""
        import numpy as np
        import torch

        name = _find(arrays, self.samples, SAMPLES, self.dotted("samples"), path)
        if name is None:
            raise UserError(
                f"{path} holds {', '.join(arrays) or 'nothing'}: {self.dotted('samples')} says which array "
                "the samples are"
            )
        found = np.asarray(arrays[name])
        if (
            found.ndim not in (3, 4, 5)
            or found.dtype.kind not in "uif"
            or len(found) < 2
            or 0 in found.shape
        ):
            raise UserError(
                f"{name} of {path} is {found.dtype} of shape {found.shape}: allowed are numbers of two or "
                f"more {SHAPES}"
            )
        if self.channels_last:
            found = np.moveaxis(found, -1, 1)
        with np.errstate(over="ignore"):  # infinity is refused with the sample's number
            whole = found if found.dtype == np.uint8 else found.astype(np.float32)
        return torch.from_numpy(np.array(whole))  # a copy: the file may be mapped, and read-only

    def _words(self, arrays: Mapping[str, Array], path: Path, count: int) -> list[str]:
        """Each sample's caption or label as a word; empty where there are none."""
        import numpy as np

        usual = () if self.labels else CAPTIONS  # labels that are named are meant
        name = _find(arrays, self.captions, usual, self.dotted("captions"), path)
        if name is None:
            name = _find(arrays, self.labels, LABELS, self.dotted("labels"), path)
        if name is None:
            return []
        found = np.asarray(arrays[name])
        plain = found.dtype.kind != "O" or all(isinstance(word, str | bytes) for word in found.flat)
        if found.shape != (count,) or found.dtype.kind not in "iuUSO" or not plain:
            raise UserError(
                f"{name} of {path} is {found.dtype} of shape {found.shape}: allowed are words or whole "
                f"numbers, one for each of the {count} samples"
            )
        return [
            word.decode(errors="replace") if isinstance(word, bytes) else str(word)
            for word in found.tolist()
        ]

    def _beyond(self, samples: Tensor, arrays: Mapping[str, Array], path: Path) -> Tensor:
        """Where samples have ended, (M, 1, L) or (M, 1, T, 1, 1)."""
        import numpy as np
        import torch

        name = _find(arrays, self.lengths, (), self.dotted("lengths"), path)
        lengths, longest = np.asarray(arrays[str(name)]), samples.shape[2]
        if samples.ndim == 4 or samples.dtype == torch.uint8:
            raise UserError(f"{self.dotted('lengths')}: allowed for signals and videos of floats")
        if lengths.shape != samples.shape[:1] or lengths.dtype.kind not in "iu":
            raise UserError(f"{name} of {path}: allowed is a whole number for each sample")
        if not (lengths.min() >= 1 and lengths.max() <= longest):
            raise UserError(f"{name} of {path}: allowed are lengths from 1 to {longest}")
        places = torch.arange(longest).view(1, 1, -1, *[1] * (samples.ndim - 3))
        ends = torch.from_numpy(lengths.astype(np.int64)).view(-1, *[1] * (samples.ndim - 1))
        return places >= ends


def _as_number(word: str) -> tuple[bool, int, str]:
    """Sorts whole numbers by value, and words after them."""
    whole = word.removeprefix("-").isdecimal() and len(word) < LONGEST_NUMBER
    return (not whole, int(word) if whole else 0, word)


def _find(
    arrays: Mapping[str, Array], given: str, usual: tuple[str, ...], setting: str, path: Path
) -> str | None:
    """The name of an array: the given one, or the first of the usual ones that is there."""
    if given and given not in arrays:
        raise UserError(f"{setting} is {given!r}: {path} holds {', '.join(arrays) or 'nothing'}")
    if given:
        return given
    return next((name for name in usual if name in arrays), None)


def _scaled(samples: Tensor, train: Tensor, path: Path) -> Tensor:
    """Bytes as they are, and floats in [-1, 1]."""
    import torch

    if samples.dtype == torch.uint8:
        return samples
    largest = samples.abs().flatten(1).amax(dim=1)
    if not bool((largest <= LARGEST).all()):
        number = int((~(largest <= LARGEST)).nonzero()[0])
        fault = f"beyond {LARGEST:g}" if largest[number].isfinite() else "that are not finite"
        raise UserError(f"{path}: sample {number} holds values {fault}")
    if bool(largest.max() <= 1):
        return samples
    per_channel = samples[train].movedim(1, 0).flatten(1)
    low, high = per_channel.amin(dim=1), per_channel.amax(dim=1)
    shape = (1, -1, *[1] * (samples.ndim - 2))
    middle, half = ((high + low) / 2).view(shape), ((high - low) / 2).clamp(min=1e-12).view(shape)
    return (samples - middle) / half


def _read(path: Path) -> Mapping[str, Array]:
    """The arrays of a file by name."""
    from selfalign.arrays import Hdf5, Npz, read_npy

    if path.suffix == ".npz":
        return Npz(path)
    if path.suffix == ".npy":
        return {SAMPLES[0]: read_npy(path)}
    if path.suffix in (".h5", ".hdf5"):
        return Hdf5(path)
    raise UserError(
        f"data.root is {str(path)!r}: allowed is a .npz, .npy or .h5 file with {SHAPES}"
    )

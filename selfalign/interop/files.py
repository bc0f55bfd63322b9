"""Checkpoints of other projects as named tensors, whatever their scripts have wrapped them in."""

import argparse
import pathlib
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfalign.errors import UserError
from selfalign.weights import listed, not_finite, read_safetensors, require_plain

CONTAINERS = ("ema", "model", "state_dict")
"""Where the projects' training scripts put weights in a .pt file, the best first."""
AVERAGED = ("ema_model.", "ema.")
"""Where modules that hold trained and averaged weights side by side put the averaged ones."""
_COUNTERS = frozenset(["n_averaged", "initted", "step"])
"""What wrappers that average weights (torch's AveragedModel, ema-pytorch) keep beside them."""


def _empty_array(*_: object) -> np.ndarray:
    """In place of numpy's own beginning of an array, which takes any class and any size."""
    return np.empty(0, np.uint8)


# What training scripts keep beside weights and may be made from a pickle: calling these does no more
# than hold values. Paths become pure ones, which cannot touch the disk.
_SCALAR = np.dtype(float).type(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    *((pathlib.PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "PurePosixPath")),
    *((pathlib.PureWindowsPath, f"pathlib.{name}") for name in ("WindowsPath", "PureWindowsPath")),
    *((pathlib.PurePosixPath, f"pathlib._local.{name}") for name in ("PosixPath", "PurePosixPath")),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_empty_array, "numpy.core.multiarray._reconstruct"),
    (_empty_array, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdgFDSU"),
]


def read_weights(path: Path | str, prefer: Literal["ema", "raw"] = "ema") -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pt file by name, the averaged (`ema`) ones if it has them.

    With `raw` those of the trained model, if it has them.

    Prefixes that all names share are taken off. Nothing in the file can run code: pickles are read with
    `weights_only`. That an average is there and has no weights is warned of, where others are taken.

    Raises:
        UserError: no such file, a damaged one, or one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} does not exist or is not a file")
    content: object = read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    order = CONTAINERS if prefer == "ema" else (*CONTAINERS[1:], CONTAINERS[0])
    tensors = _find(content, order)
    if not tensors:
        raise UserError(
            f"checkpoint {str(path)!r} holds no weights: looked for tensors by name, at the top or "
            f"in {', '.join(CONTAINERS)}"
        )
    _check(path, tensors)
    average = CONTAINERS[0]
    kept = content if isinstance(content, Mapping) and prefer == "ema" else {}
    if average in kept and not _find(kept[average], order):
        warnings.warn(
            f"checkpoint {str(path)!r}: {average} holds no weights by name; those of the trained model are "
            "taken, which are not averaged",
            stacklevel=2,
        )
    return without_prefixes(tensors)


def stated_project(path: Path | str) -> str | None:
    """Whose layout and time a .safetensors file that this package wrote has; None where it does not say."""
    if Path(path).suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as opened:
            return (opened.metadata() or {}).get("from")
    except (OSError, SafetensorError, ValueError):  # what is wrong is told by who reads its weights
        return None


def without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers have put before every name, and beside them."""
    wrapped = {name: value for name, value in weights.items() if name not in _COUNTERS}
    if averaged := {name: v for name, v in wrapped.items() if name.startswith(AVERAGED)}:
        wrapped = averaged  # beside the weights that are trained
    while prefix := _shared_prefix(wrapped):
        weights = wrapped = {name.removeprefix(prefix): v for name, v in wrapped.items()}
    return dict(weights)


def _shared_prefix(names: Collection[str]) -> str:
    """What a wrapper (DDP, torch.compile, Lightning) has put before all of the names; empty if none has.

    It is a word of its own before a dot; what numbers follow is a list of modules, and no wrapper.
    """
    first, dot, rest = next(iter(names), "").partition(".")
    prefix = first + dot
    shared = bool(rest) and len(names) > 1 and all(name.startswith(prefix) for name in names)
    return prefix if shared and not rest[0].isdigit() else ""


def _unpickle(path: Path) -> object:
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > path.stat().st_size:  # torch does not compress
                raise UserError(
                    f"checkpoint {str(path)!r} is damaged: it unpacks to {size:,} bytes, more than it has"
                )
        # With mmap, the optimizer's state and the weights that are not used stay on the disk.
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage, which is told below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        held = re.search(r"(?:GLOBAL |got <class ')([\w.]+)", str(error))
        which = f" ({held[1]})" if held else ""
        remedy = (
            "; if you trust it, load it with torch.load(…, weights_only=False) and save its weights "
            "alone with safetensors.torch.save_file"
        )
        raise UserError(
            f"checkpoint {str(path)!r} is damaged, or holds more than tensors and plain values{which}"
            + (remedy if held else "")
        ) from error


def _find(content: object, order: Sequence[str], depth: int = 3) -> dict[str, Tensor]:
    """The best tensors by name: those of the first container that has any, else those at the top."""
    if not isinstance(content, Mapping):
        return {}
    if depth:
        for name in order:
            if tensors := _find(content.get(name), order, depth - 1):
                return tensors
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _check(path: Path, tensors: Mapping[str, Tensor]) -> None:
    require_plain(tensors, path)
    if poisoned := not_finite(tensors):
        raise UserError(f"checkpoint {str(path)!r}: {listed(poisoned)} is not finite")

"""Named tensors from files: read without running code, and checked before they reach a model."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from selfalign.errors import UserError

Weights = Mapping[str, Tensor]
PLAIN = frozenset(
    [
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    ]
)
"""Kinds of numbers that weights can be."""


def read_safetensors(
    path: Path, keep: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on the CPU.

    Args:
        path: the file.
        keep: given a name and its tensor, returns what is to be kept of it; tensors are then read one by
            one.

    Raises:
        UserError: the file is missing or damaged, or holds numbers that nothing here computes with; the
            message names it.
    """
    if not path.is_file():
        raise UserError(f"{path} cannot be read: there is no such file")
    try:
        if keep is not None and _is_utf8(path):
            found = {}
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    require_plain({name: tensor}, path)
                    found[name] = keep(name, tensor)
            return found
        tensors = load_file(path) if _is_utf8(path) else load(path.read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    require_plain(tensors, path)
    return {name: keep(name, value) if keep else value for name, value in tensors.items()}


def require_plain(tensors: Weights, path: Path) -> None:
    """Refuse tensors of a file that are not plain numbers: sparse, nested, quantized, complex, of no values.

    Raises:
        UserError: the message names file, tensors and dtypes.
    """
    wrong = [
        f"{name} ({_name(value.dtype)})"
        for name, value in tensors.items()
        if value.dtype not in PLAIN
        or value.layout != torch.strided
        or value.is_nested
        or value.is_meta
        or value.nbytes > value.untyped_storage().nbytes()  # one number, said to be many
    ]
    if wrong:
        raise UserError(f"{path} cannot be used: {listed(wrong)} is no plain tensor")


def read_header(path: Path) -> None:
    """Refuse a .safetensors file that is cut off, without reading its tensors.

    Raises:
        UserError: the header is damaged, or does not fit the file's size.
    """
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def write_safetensors(path: Path, tensors: Weights, facts: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, with facts in its header. Raises OSError."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    try:
        if _is_utf8(path):
            save_file(contiguous, path, facts)
        else:
            path.write_bytes(save(contiguous, facts))
    except SafetensorError as error:  # a full disk, for one
        number = re.search(r"os error (\d+)", str(error))
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise OSError(str(error)) from error


def _is_utf8(path: Path) -> bool:
    """Whether safetensors can open it; folders of other names are read and written through memory."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def differences(expected: Weights, found: Weights, dtypes: bool = True) -> list[str]:
    """How tensors differ from what is expected in name, shape and dtype, a phrase each.

    Args:
        expected: tensors of the right names, shapes and dtypes; they may be on the meta device.
        found: what is looked at.
        dtypes: whether another dtype is a difference; whole numbers in the place of fractions always are,
            as in quantised weights, whose scales are elsewhere.
    """
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name not in found:
            continue
        if found[name].shape != tensor.shape:
            shapes = tuple(found[name].shape), tuple(tensor.shape)
            wrong.append(f"{name} has shape {shapes[0]} and not {shapes[1]}")
        elif (dtypes or tensor.is_floating_point() != found[name].is_floating_point()) and (
            found[name].dtype != tensor.dtype
        ):
            wrong.append(f"{name} is {_name(found[name].dtype)} and not {_name(tensor.dtype)}")
    return wrong


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its shard."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards; all processes have to ask. Others as they are."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """What this process holds of a whole tensor where another one is sharded; else the tensor itself."""
    if not hasattr(like, "placements") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    moved = tensor.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def not_finite(tensors: Weights) -> list[str]:
    """Names of the tensors that hold NaN or infinity, in this process's part of them.

    One pass over the memory of each.
    """
    found = []
    for name, tensor in tensors.items():
        tensor = local(tensor)
        if tensor.is_floating_point() and tensor.numel():
            bounds = torch.stack(tensor.detach().aminmax())  # NaN in any place makes both NaN
            if not bool(bounds.isfinite().all()):
                found.append(name)
    return found


def weights_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named weights: of their names, shapes and values, whatever file holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def listed(phrases: Sequence[str], most: int = 3) -> str:
    """The first phrases of a list, and how many more there are."""
    more = f", and {len(phrases) - most:,} more" if len(phrases) > most else ""
    return ", ".join(phrases[:most]) + more


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

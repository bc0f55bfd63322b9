"""Checkpoints: whole or absent, never half; no pickle.

A checkpoint is a folder `checkpoints/step_*/` with `model.safetensors`, `ema.safetensors`,
`optimizer.safetensors` and `state.json`. It is written beside its place and renamed into it; the file
`checkpoints/latest` names the last one that is whole.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfalign.disk import publish
from selfalign.errors import UserError

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    student: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` below `folder`, make it the latest, and drop old ones.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimizer steps done.
        student, ema: the unwrapped models.
        optimizer: its parameters are the student's, in order.
        state: whatever else the run needs, as JSON can hold it.
        keep: how many of the last checkpoints stay.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / checkpoint_name(step)
    partial = folder / f".{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
        if not target.exists():
            partial.mkdir()
            save_file(_contiguous(student.state_dict()), partial / "model.safetensors")
            save_file(_contiguous(ema.state_dict()), partial / "ema.safetensors")
            save_file(_optimizer_tensors(student, optimizer), partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps({**state, "step": step}, indent=2))
            publish(partial, target)
        pointer = folder / ".latest.partial"
        pointer.write_text(target.name + "\n")
        publish(pointer, folder / "latest")
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {target} cannot be written: {error}") from error
    for old in sorted(folder.glob("step_*"))[:-keep]:
        # Renamed first, so that what is being deleted never looks like a checkpoint.
        doomed = folder / f".{old.name}.partial"
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def latest_checkpoint(folder: Path) -> Path:
    """The run's last whole checkpoint.

    Raises:
        UserError: there is none.
    """
    pointer = folder / "latest"
    if not pointer.is_file():
        raise UserError(f"{folder} holds no checkpoint")
    target = folder / pointer.read_text().strip()
    missing = [name for name in FILES if not (target / name).is_file()]
    if missing:
        raise UserError(f"checkpoint {target} lacks {', '.join(missing)}")
    return target


def load_weights(checkpoint: Path, model: nn.Module, file: str) -> None:
    """Load `model.safetensors` or `ema.safetensors` of a checkpoint.

    Raises:
        UserError: the file is damaged or belongs to another model.
    """
    try:
        model.load_state_dict(_load(checkpoint / file))
    except RuntimeError as error:
        raise UserError(f"{checkpoint / file} does not fit the model: {error}") from error


def load_optimizer(checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state of a checkpoint.

    Raises:
        UserError: the file is damaged or belongs to another model.
    """
    tensors = _load(checkpoint / "optimizer.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, _) in enumerate(student.named_parameters()):
        own = {
            key.split("|")[0]: value for key, value in tensors.items() if key.endswith(f"|{name}")
        }
        if not own:
            raise UserError(f"{checkpoint / 'optimizer.safetensors'} lacks the state of {name}")
        state[index] = own
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as state, and the step."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / 'state.json'} cannot be read: {error}") from error


def _optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = [name for name, _ in student.named_parameters()]
    return {
        f"{key}|{names[index]}": value.contiguous()
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error

"""Checkpoints: whole or absent, never half, never poisoned; no pickle.

A checkpoint is a folder `checkpoints/step_*/` with `model.safetensors`, `ema.safetensors`, perhaps further
averages (`ema-0.999.safetensors`), `optimizer.safetensors`, `state.json`, and the checksums of these in
`checksums.json`. It is written
beside its place and renamed into it; the file `checkpoints/latest` names the last one that is whole, and
`checkpoints/monitored` the last one whose monitors are through.
"""

import contextlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from selfalign.disk import publish, reason, require_room, sweep, write_whole
from selfalign.errors import UserError
from selfalign.records import read_bytes, read_json, write_json
from selfalign.weights import (
    differences,
    listed,
    local,
    not_finite,
    read_header,
    read_safetensors,
    shard_like,
    write_safetensors,
)

WEIGHTS = {"raw": "model.safetensors", "ema": "ema.safetensors"}
FILES = (*WEIGHTS.values(), "optimizer.safetensors", "state.json")
CHECKSUMS = "checksums.json"
_NAME = re.compile(r"step_(\d{8,15})")
_CHUNK = 2**22

Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]


class CheckpointState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run is besides its tensors: `state.json`."""

    step: Count
    """Optimizer steps done."""
    scaler: dict[str, int | float] | None = None
    """Of the gradients, under fp16."""
    skipped: Count = 0
    """Steps left out because they were not finite."""
    optimizer: str | None = None
    """Name of the optimizer; None in checkpoints that did not record it."""
    curriculum: dict[str, Any] | None = None
    """What a learned curriculum has learnt."""


class Checksums(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`checksums.json`: damage is found by them, not malice."""

    xxh3_128: dict[str, str]
    """By file; hexadecimal."""


def weights_file(weights: str, decays: Sequence[float]) -> str:
    """The file of a checkpoint that holds some weights.

    Args:
        weights: raw, ema, or ema:DECAY.
        decays: of the run's averages; the first one is `ema`.

    Raises:
        UserError: the run keeps no such average.
    """
    files = WEIGHTS | {f"ema:{decay!r}": f"ema-{decay!r}.safetensors" for decay in decays}
    files[f"ema:{decays[0]!r}"] = WEIGHTS["ema"]
    kind, colon, decay = weights.partition(":")
    with contextlib.suppress(ValueError):
        weights = f"{kind}{colon}{float(decay)!r}" if colon else weights
    if weights not in files:
        raise UserError(f"weights are {weights!r}: this run keeps {', '.join(files)}")
    return files[weights]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The optimizer steps of a checkpoint, from the name of its folder."""
    return int(checkpoint.name.removeprefix("step_"))


def save_checkpoint(
    folder: Path,
    student: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: CheckpointState,
    keep: int,
    averages: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint below `folder`, make it the latest, and drop old ones.

    Args:
        folder: the run's `checkpoints` folder.
        student, ema: the unwrapped models.
        optimizer: its parameters are the student's, in order.
        state: the step, and whatever else the run needs.
        keep: how many of the last checkpoints stay.
        averages: further ones, by file.

    Raises:
        UserError: the disk is full or not writable, or a tensor is not finite; earlier checkpoints are
            untouched.
    """
    tensors = checkpoint_tensors(student, ema, optimizer, averages)
    require_finite(folder, state, tensors)
    try:
        partial = begin_checkpoint(folder, state)
        for file, named in tensors.items():
            write_safetensors(partial / file, named)
        target = complete_checkpoint(folder, list(tensors), state)
    except (OSError, SafetensorError, UserError) as error:
        needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
        why = reason(error, folder, needed)
        sweep(folder)
        target = folder / checkpoint_name(state.step)
        raise UserError(f"checkpoint {target} cannot be written: {why}") from error
    prune(target, keep)
    return target


def checkpoint_tensors(
    student: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, nn.Module] = MappingProxyType({}),
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file and name. Arguments as for `save_checkpoint`."""
    return {
        "model.safetensors": student.state_dict(),
        "ema.safetensors": ema.state_dict(),
        **{file: model.state_dict() for file, model in averages.items()},
        "optimizer.safetensors": _optimizer_tensors(student, optimizer),
    }


def require_finite(
    folder: Path, state: CheckpointState, tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Refuse to write numbers that are not finite.

    Raises:
        UserError: there are some; the message names tensor and file.
    """
    for file, named in tensors.items():
        if poisoned := not_finite(named):
            raise UserError(
                f"checkpoint {folder / checkpoint_name(state.step)} is not written: {listed(poisoned)} of "
                f"{file} is not finite; earlier checkpoints are untouched"
            )


def partial_checkpoint(folder: Path, state: CheckpointState) -> Path:
    """Where a checkpoint is written until it is whole."""
    return folder / f".{checkpoint_name(state.step)}.partial"


def begin_checkpoint(folder: Path, state: CheckpointState) -> Path:
    """Make the empty folder of `partial_checkpoint`; what interrupted writing left goes."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    partial = partial_checkpoint(folder, state)
    partial.mkdir()
    return partial


def complete_checkpoint(folder: Path, files: Sequence[str], state: CheckpointState) -> Path:
    """Add state and checksums to the files of a checkpoint, and make it the latest.

    Args:
        folder: the run's `checkpoints` folder.
        files: that have been written into `partial_checkpoint`.
        state: as for `save_checkpoint`.
    """
    target = folder / checkpoint_name(state.step)
    partial = partial_checkpoint(folder, state)
    write_json(partial / "state.json", state)
    sums = {file: _checksum(partial / file) for file in (*files, "state.json")}
    write_json(partial / CHECKSUMS, Checksums(sums))
    if target.exists():  # of the same step, before the run went back to an earlier one
        _drop(target)
    publish(partial, target)
    _point(folder / "latest", target)
    return target


def prune(newest: Path, keep: int) -> None:
    """Drop the checkpoints before one, but for as many as stay, and what was dropped in part.

    Args:
        newest: a checkpoint; what came after it is not looked at.
        keep: how many stay, this one included.
    """
    sweep(newest.parent)
    for old in [c for c in checkpoints(newest.parent) if step_of(c) <= step_of(newest)][:-keep]:
        _drop(old)


def require_room_for_checkpoint(folder: Path, *models: nn.Module) -> None:
    """Refuse a disk that cannot take the weights of a checkpoint, before any step is made.

    Args:
        folder: the run's `checkpoints` folder.
        models: the student and its averages; the optimizer's state, which comes on top, is not counted.

    Raises:
        UserError: the message says what is needed and what is free.
    """
    tensors = (tensor for model in models for tensor in model.state_dict().values())
    require_room(folder, sum(tensor.nbytes for tensor in tensors), "the weights of a checkpoint")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a run's `checkpoints` folder, the oldest first."""
    return sorted((p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)), key=step_of)


def latest_checkpoint(folder: Path) -> Path:
    """The run's last checkpoint: the one that `latest` names.

    Raises:
        UserError: there is none, or `latest` names something else.
    """
    pointer = folder / "latest"
    if not os.path.lexists(pointer):
        # A run that was killed between its first checkpoint's renaming and this file's has one.
        if found := checkpoints(folder):
            return found[-1]
        raise UserError(f"{folder} holds no checkpoint")
    name = read_bytes(pointer, limit=100).decode(errors="backslashreplace").strip()
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{pointer} names {name!r}: allowed is a folder beside it, such as {checkpoint_name(1)}"
        )
    return folder / name


def choose_checkpoint(folder: Path, step: int | None, files: Sequence[str] = FILES) -> Path:
    """The checkpoint of a step, or else the latest, whose files are whole.

    Args:
        folder: the run's `checkpoints` folder.
        step: of which; None for the latest.
        files: what is needed of it.

    Raises:
        UserError: there is none, or it is damaged: the message says which one is whole.
    """
    chosen = None
    try:
        chosen = latest_checkpoint(folder) if step is None else folder / checkpoint_name(step)
        verify(chosen, files)
        return chosen
    except UserError as error:
        whole = _newest_whole(folder, chosen, files)
        if whole is None:
            raise
        raise UserError(
            f"{error}; the newest whole checkpoint is that of step {step_of(whole)}: go on from it "
            f"with --step {step_of(whole)}"
        ) from error


def verify(checkpoint: Path, files: Sequence[str] = FILES) -> CheckpointState:
    """Check files of a checkpoint by their checksums; those of version 0.1.0 have none.

    Returns:
        Its state.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {checkpoint} does not exist")
    files = (*files, "state.json")
    missing = [name for name in dict.fromkeys(files) if not (checkpoint / name).is_file()]
    if missing:
        raise UserError(f"checkpoint {checkpoint} lacks {', '.join(missing)}")
    if os.path.lexists(checkpoint / CHECKSUMS):
        sums = read_json(checkpoint / CHECKSUMS, Checksums).xxh3_128
        for file in files:
            if _checksum(checkpoint / file) != sums.get(file):
                raise UserError(f"{checkpoint / file} is damaged: its checksum is another")
    else:
        for file in files:
            if file.endswith(".safetensors"):
                read_header(checkpoint / file)
    state = read_json(checkpoint / "state.json", CheckpointState)
    if checkpoint_name(state.step) != checkpoint.name:
        raise UserError(f"{checkpoint / 'state.json'} is damaged: it says step {state.step}")
    return state


def load_weights(checkpoint: Path, model: nn.Module, file: str) -> None:
    """Load `model.safetensors` or `ema.safetensors` of a checkpoint.

    Raises:
        UserError: the file is damaged or belongs to another model.
    """
    own = model.state_dict()
    tensors = _load(checkpoint / file, own)
    if wrong := differences(own, tensors):
        raise UserError(f"{checkpoint / file} does not fit the model: {listed(wrong)}")
    model.load_state_dict(tensors)


def load_optimizer(checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state of a checkpoint.

    Raises:
        UserError: the file is damaged or belongs to another model.
    """
    path = checkpoint / "optimizer.safetensors"
    names = {parameter: name for name, parameter in student.named_parameters()}
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for entry, value in _load(path, dict(student.named_parameters())).items():
        key, _, name = entry.partition("|")
        found[name][key] = value
    wrong = [f"{name!r} is unknown" for name in found.keys() - names.values()]
    state: dict[int, dict[str, Tensor]] = {}
    index = 0
    for group in optimizer.param_groups:
        own = [names[parameter] for parameter in group["params"]]
        keys = _state_keys(group) or sorted(set().union(*(found[name] for name in own))) or ["step"]
        for parameter, name in zip(group["params"], own, strict=True):
            # A number is a count of steps; everything else is shaped like the parameter.
            expected = {
                key: parameter.new_empty((), device="meta", dtype=torch.float32)
                if key == "step"
                else torch.empty_like(parameter, device="meta")
                for key in keys
            }
            wrong += [f"{text} of {name}" for text in differences(expected, found[name])]
            wrong += [
                f"{key} of {name} is negative"
                for key in ("step", "exp_avg_sq")
                if key in found[name] and local(found[name][key]).lt(0).any()
            ]
            state[index] = found[name]
            index += 1
    if wrong:
        raise UserError(f"{path} does not fit the model: {listed(wrong)}")
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _state_keys(group: Mapping[str, Any]) -> list[str]:
    """What torch's Adam and Muon keep per parameter; empty for optimizers that only their file knows."""
    if "amsgrad" in group:
        return ["exp_avg", "exp_avg_sq", "step"]
    return ["momentum_buffer"] if "ns_coefficients" in group else []


def rewind(folder: Path, checkpoint: Path) -> None:
    """Make a checkpoint the latest, and drop those after it."""
    _point(folder / "latest", checkpoint)
    for later in checkpoints(folder):
        if step_of(later) > step_of(checkpoint):
            _drop(later)


def mark_monitored(folder: Path, step: int) -> None:
    """Note that the monitors of a step that has a checkpoint are through."""
    _point(folder / "monitored", folder / checkpoint_name(step))


def is_monitored(checkpoint: Path) -> bool:
    """Whether a run that goes on from this checkpoint need not call its monitors again.

    Raises:
        UserError: a folder is in the place of the file that says so, and could not be replaced.
    """
    if not (checkpoint / CHECKSUMS).exists():
        return True  # version 0.1.0 called them before it wrote the checkpoint
    mark = checkpoint.parent / "monitored"
    if mark.is_dir():
        raise UserError(f"{mark} cannot be read: it is not a file")
    return mark.is_file() and read_bytes(mark, limit=100).strip() == checkpoint.name.encode()


def _point(pointer: Path, checkpoint: Path) -> None:
    write_whole(pointer, lambda partial: partial.write_text(f"{checkpoint.name}\n"))


def _drop(checkpoint: Path) -> None:
    # Renamed first, so that what is being deleted never looks like a checkpoint.
    doomed = checkpoint.with_name(f".{checkpoint.name}.dropped.partial")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _newest_whole(folder: Path, damaged: Path | None, files: Sequence[str]) -> Path | None:
    for checkpoint in reversed(checkpoints(folder)):
        if checkpoint != damaged:
            try:
                verify(checkpoint, files)
            except UserError:
                continue
            return checkpoint
    return None


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _optimizer_tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {p: name for name, p in student.named_parameters()}
    return {
        f"{key}|{names[parameter]}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _load(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file; of what is sharded in a model, this process's part.

    Args:
        path: the file.
        like: the model's tensors, by the name that stands last in the file's.
    """

    def own(name: str, tensor: Tensor) -> Tensor:
        model = like.get(name.rpartition("|")[2])
        return tensor if model is None else shard_like(tensor, model)

    sharded = any(hasattr(tensor, "placements") for tensor in like.values())
    tensors = read_safetensors(path, own if sharded else None)
    if poisoned := not_finite(tensors):
        raise UserError(f"{path} is damaged: {listed(poisoned)} is not finite")
    return tensors

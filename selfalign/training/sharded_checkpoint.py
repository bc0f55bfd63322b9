"""Checkpoints of sharded runs: the usual files, of shards that are written while training goes on.

torch.distributed.checkpoint writes the shards and joins them, through files, so that no process ever holds
the whole model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from selfalign.disk import reason, sweep
from selfalign.errors import UserError
from selfalign.processes import together
from selfalign.training.checkpoint import (
    CheckpointState,
    begin_checkpoint,
    checkpoint_name,
    complete_checkpoint,
    partial_checkpoint,
    prune,
    require_finite,
)

_BETWEEN = "::"


class ShardedCheckpoints:
    """Writes checkpoints in the background, one at a time. All processes call all methods.

    Args:
        accelerator: the processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        # Of its own: training meets in the default group meanwhile, on GPUs by nccl.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        folder: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: CheckpointState,
        keep: int,
    ) -> None:
        """Copy the shards and begin to write them.

        Args:
            folder: the run's `checkpoints` folder.
            tensors: by file and name.
            state, keep: as for `save_checkpoint`.

        Raises:
            UserError: a tensor is not finite, the folder is not writable, or the checkpoint before this one
                could not be written.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.finish()
        with together(self._accelerator):
            require_finite(folder, state, tensors)
        with together(self._accelerator):
            if self._accelerator.is_main_process:
                try:
                    begin_checkpoint(folder, state)
                except OSError as error:
                    raise _failure(error, folder, state) from error
        named, files = {}, {}
        for number, (file, held) in enumerate(tensors.items(), 1):
            for name, tensor in held.items():
                # torch 2.14 joins tensors without axes to zeros.
                named[f"{file}{_BETWEEN}{name}"] = tensor if tensor.ndim else tensor.reshape(1)
                files[f"{file}{_BETWEEN}{name}"] = number
        scalars = {name for held in tensors.values() for name in held if not held[name].ndim}
        partial = partial_checkpoint(folder, state)
        writer = HuggingFaceStorageWriter(
            str(partial), files, save_distributed=True, enable_consolidation=True
        )
        written = async_save(named, storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future)
        self._pending = self._thread.submit(
            self._complete, written, folder, list(tensors), scalars, state, keep
        )

    def finish(self) -> None:
        """Wait until the last checkpoint is there.

        Raises:
            UserError: it could not be written; earlier checkpoints are untouched.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with together(self._accelerator):
            pending.result()

    def _complete(
        self,
        written: Future[Any],
        folder: Path,
        files: list[str],
        scalars: Set[str],
        state: CheckpointState,
        keep: int,
    ) -> None:
        partial = partial_checkpoint(folder, state)
        try:
            written.result()
            if self._accelerator.is_main_process:
                for number, file in enumerate(files, 1):
                    joined = partial / f"model-{number:05d}-of-{len(files):05d}.safetensors"
                    _rename_tensors(joined, f"{file}{_BETWEEN}", scalars)
                    joined.rename(partial / file)
                shutil.rmtree(partial / "sharded")
                (partial / "model.safetensors.index.json").unlink()
                target = complete_checkpoint(folder, files, state)
        except BaseException as error:  # CheckpointException, for one, is no Exception
            if self._accelerator.is_main_process:
                sweep(folder)
            raise _failure(error, folder, state) from error
        if self._accelerator.is_main_process:
            prune(target, keep)


def _rename_tensors(path: Path, prefix: str, scalars: Set[str]) -> None:
    """Take a prefix off the names in a .safetensors file, and the axis off what has none.

    In place: the header stays as long as it was.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        named = {name.removeprefix(prefix): value for name, value in header.items()}
        for name in scalars & named.keys():
            named[name]["shape"] = []
        file.seek(8)
        file.write(json.dumps(named, separators=(",", ":")).encode().ljust(length))


def _failure(error: BaseException, folder: Path, state: CheckpointState) -> UserError:
    """What a process ran into, also out of what torch.distributed.checkpoint makes of it."""
    for failed, *_ in getattr(error, "failures", {}).values():
        error = failed
    target = folder / checkpoint_name(state.step)
    return UserError(f"checkpoint {target} cannot be written: {reason(error, folder)}")

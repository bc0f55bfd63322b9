"""The device, the processes and the arithmetic of a run."""

import warnings
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from selfalign.errors import UserError
from selfalign.processes import open_accelerator
from selfalign.sections import TrainingConfig
from selfalign.training.sharding import check_sharding

_OF_DDP = (
    # The newer name is no setting of accelerate's yet, and does less.
    "`broadcast_buffers` is deprecated",
    # Of the patches' weights, a few thousand numbers, whose gradient comes channel by channel.
    "Grad strides do not match bucket view strides",
)
"""Warnings of torch's data-parallel module that tell a user nothing, by their beginnings."""
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(training: TrainingConfig, folder: Path) -> Accelerator:
    """The device, processes and precision of a run.

    Raises:
        UserError: the device lacks the precision, a tracker is not installed, or the batch does not divide
            over the processes.
    """
    for name in training.trackers:
        if name not in map(str, get_available_trackers()):  # accelerate would leave it out silently
            raise UserError(
                f"training.trackers {name} needs the package {name}: pip install {name}"
            )
    for message in _OF_DDP:
        warnings.filterwarnings("ignore", message)
    refusal = (
        f"training.precision is {training.precision!r}: not on this device; fp32 runs everywhere"
    )
    try:
        accelerator = open_accelerator(
            PRECISIONS[training.precision],
            training.tf32,
            log_with=list(training.trackers) or None,
            project_config=ProjectConfiguration(
                str(folder), logging_dir=str(folder / "tensorboard")
            ),
            # Buffers are constants; processes would send them to each other at every step.
            handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise UserError(f"{refusal} ({error})") from error
    if training.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(f"{refusal}, bf16 on CPUs too")  # accelerate would quietly run float32
    check_sharding(training, accelerator)
    shares = accelerator.num_processes * training.gradient_accumulation
    if training.batch_size % shares:
        raise UserError(
            f"training.batch_size is {training.batch_size}: must be a multiple of {shares} "
            f"({accelerator.num_processes} processes × {training.gradient_accumulation} micro-batches)"
        )
    return accelerator

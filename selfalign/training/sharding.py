"""Shards: weights, gradients, moments and averages spread over the processes, block by block (FSDP2).

torch's `fully_shard` does it; accelerate's own plugin for that is for GPUs only and takes one model, where
here student and averages are sharded alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from selfalign.config import ResolvedConfig
from selfalign.errors import UserError
from selfalign.network import Backbone
from selfalign.sections import TrainingConfig
from selfalign.student import build_student
from selfalign.weights import gathered


def is_sharded(training: TrainingConfig, accelerator: Accelerator) -> bool:
    """Whether the processes of a run hold shards; one process alone holds everything."""
    return training.sharding != "none" and accelerator.num_processes > 1


def check_sharding(training: TrainingConfig, accelerator: Accelerator) -> None:
    """Refuse what cannot be sharded, before any work is done.

    Raises:
        UserError: the precision or the installed torch does not allow it.
    """
    if not is_sharded(training, accelerator):
        return
    if training.precision == "fp16":
        raise UserError("training.sharding takes training.precision fp32 and bf16, not fp16")
    try:
        import torch.distributed.checkpoint._consolidate_hf_safetensors
    except ImportError as error:
        raise UserError(
            f"training.sharding is {training.sharding!r}: it needs torch 2.9 or newer, and this is "
            f"{torch.__version__}; allowed is none"
        ) from error


def shard(model: Backbone, training: TrainingConfig, accelerator: Accelerator) -> None:
    """Shard a model in place: each block and each head is gathered by itself when it is run.

    `gradients` keeps weights gathered from the forward pass to the end of the backward pass (ZeRO's second
    stage), `full` gathers them twice (its third). Under bf16, weights are gathered and multiplied in bf16;
    shards, gradients that are summed over processes, and moments stay float32, and what autocast keeps in
    float32 is computed in it.

    Args:
        model: the same numbers in every process.
        training: kind of sharding, and precision.
        accelerator: the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    settings: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if training.precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # bf16 would round timesteps
        ),
    }
    # What stays gathered is let go of in the backward pass, which averages have none of: they would be run
    # with the weights of their first step for ever.
    trained = any(parameter.requires_grad for parameter in model.parameters())
    # Nothing here changes what a module returns in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for part in [*model.blocks, *map(model.get_submodule, model.head_taps)]:
        if any(True for _ in part.parameters()):
            let_go = training.sharding == "full" or not trained
            fully_shard(part, reshard_after_forward=let_go, **settings)
    fully_shard(model, reshard_after_forward=not trained, **settings)
    register_fsdp_forward_method(model, "features")  # what a teacher is asked for


@torch.no_grad()
def whole_copy(
    model: Backbone, config: ResolvedConfig, captions: Sequence[str], accelerator: Accelerator
) -> Backbone:
    """A sharded model as a whole one, in the main process; all processes have to ask.

    Args:
        model: in every process.
        config: what it was built from.
        captions: of the data, for models that are conditioned on texts.
        accelerator: the processes.

    Returns:
        The copy; in the other processes the model itself.
    """
    copy = build_student(config).to(accelerator.device) if accelerator.is_main_process else None
    if copy is not None:
        copy.describe(captions)
    own = {} if copy is None else copy.state_dict()
    for name, tensor in model.state_dict().items():
        value = gathered(tensor)
        if copy is not None:
            own[name].copy_(value)
    return model if copy is None else copy.eval().requires_grad_(False)

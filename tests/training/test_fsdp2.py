"""A sharded model has the losses and gradients of the whole one: blocks are functions of tensors.

Run by torchrun, this file is one of the processes that share a model.
"""

import copy
import os
import sys

import pytest
import torch
import torch.distributed as dist
from support import run_in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from selfalign import (
    EMA,
    Objective,
    build_student,
    draw_views,
    make_generator,
    ops,
    recipe,
    resolve,
)


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_two_processes_share_a_model(choice: str) -> None:
    run_in_processes(2, __file__, choice, timeout=180)


def compare_with_the_whole(checkpointing: bool) -> None:
    """Shard every block, then the rest, and compare one step."""
    settings = {"model.size": "tiny/2", "model.gradient_checkpointing": checkpointing}
    config = resolve(recipe("sra-dts-as", settings), 3, (16, 16), 5)
    student = build_student(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh block is the identity, whatever is in it
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    teacher, objective = EMA(student, decay=0.9).model, Objective(config)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    labels = torch.randint(5, (4,), generator=generator)
    draw = draw_views(config, images.shape, make_generator(0, "views", 0))

    whole = copy.deepcopy(student)
    expected = objective(whole, teacher, images, labels, draw).total
    expected.backward()

    mesh = init_device_mesh("cpu", (2,))
    for block in student.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    loss = objective(student, teacher, images, labels, draw).total
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-6
    for (name, own), other in zip(student.named_parameters(), whole.parameters(), strict=True):
        assert other.grad.any(), name
        assert (own.grad.full_tensor() - other.grad).abs().max() < 1e-6, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with ops.use(sys.argv[1]):
        for checkpointing in (False, True):
            compare_with_the_whole(checkpointing)
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads drop Python objects now and then, and abort a process whose interpreter has ended by
    # then (pytorch/pytorch#179291). A failed comparison does not come this far.
    os._exit(0)

"""Sharded blocks are compiled once for all of their kind, and compute what they did.

Run by torchrun, this file is one of the processes that share a model.
"""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import run_in_processes

from selfalign import recipe, resolve
from selfalign.backbones.sit.sizes import SIZES
from selfalign.data.batch import Batch
from selfalign.training.accelerator import make_accelerator
from selfalign.training.loop import begin
from selfalign.training.step import TrainingStep


@pytest.mark.slow
def test_two_graphs_for_any_depth_and_the_same_losses() -> None:
    run_in_processes(2, __file__)


def losses_of(depth: int, compiled: bool) -> list[float]:
    """Three steps of a sharded model."""
    SIZES["tiny"] = dataclasses.replace(SIZES["tiny"], depth=depth)
    settings: dict[str, Any] = {"training.batch_size": 4, "training.sharding": "full"}
    config = resolve(recipe("sra-dts-as", {"model.size": "tiny/2", **settings}), 1, (8, 8), 10)
    accelerator = make_accelerator(config.training, Path())
    source: Any = SimpleNamespace(class_names=())
    state = begin(config, source, Path(), accelerator)
    step = TrainingStep(config, accelerator, state.student, state.ema, state.optimizer)
    for block in [*state.student.blocks, *state.ema.model.blocks] if compiled else ():
        block.compile(dynamic=False, backend="aot_eager")
    generator = torch.Generator().manual_seed(accelerator.process_index)
    batch = Batch(torch.randn(2, 1, 8, 8, generator=generator), torch.zeros(2, dtype=torch.int64))
    return [float(step(number, [batch])[0][0].total.detach()) for number in range(3)]


def main() -> None:
    """Compare."""
    torch.set_num_threads(1)
    counted = torch._dynamo.utils.counters
    for depth in (3, 6):
        torch._dynamo.reset()
        counted.clear()
        plain, compiled = losses_of(depth, compiled=False), losses_of(depth, compiled=True)
        assert plain == pytest.approx(compiled, rel=1e-6)
        assert counted["stats"]["unique_graphs"] == 2 and not counted["graph_break"]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # as tests/training/test_fsdp2.py has it


if __name__ == "__main__":
    main()

"""Memory of each of two processes that train a model, with and without shards; see docs/scaling.md.

    python benchmarks/shards.py 4 8             L/2's width at these depths, sharding none and full
    python benchmarks/shards.py 24 --kinds full

Images of 8×8 make 16 tokens, so that activations are small and what counts is what a process holds.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from selfalign import recipe, resolve
from selfalign.backbones.sit.sizes import SIZES, Size
from selfalign.benchmark.measure import peak_memory_mb
from selfalign.data.batch import Batch
from selfalign.training.accelerator import make_accelerator
from selfalign.training.loop import begin
from selfalign.training.step import TrainingStep

BATCH, STEPS = 4, 3


def measure(depth: int, sharding: str) -> dict[str, Any]:
    """Take steps in this process, one of several, and return its largest memory."""
    large = SIZES["L"]
    SIZES["measured"] = Size(large.hidden_size, depth, large.heads)
    settings = {
        "model.size": "measured/2",
        "training.batch_size": BATCH,
        "training.sharding": sharding,
        "training.trackers": (),
    }
    config = resolve(recipe("sra-dts-as", settings), 1, (8, 8), 10)
    accelerator = make_accelerator(config.training, Path())
    imported = peak_memory_mb(accelerator.device)
    state = begin(config, SimpleNamespace(class_names=()), Path(), accelerator)  # type: ignore[arg-type]
    begun = peak_memory_mb(accelerator.device)
    step = TrainingStep(config, accelerator, state.student, state.ema, state.optimizer)
    share = BATCH // accelerator.num_processes
    batch = Batch(torch.randn(share, 1, 8, 8), torch.zeros(share, dtype=torch.int64))
    for number in range(STEPS):
        step(number, [batch])
    return {
        "depth": depth,
        "sharding": sharding,
        "parameters": sum(parameter.numel() for parameter in state.student.parameters()),
        "imported_mib": imported,
        "begun_mib": begun,
        "peak_mib": peak_memory_mb(accelerator.device),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("depths", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", default=["none", "full"])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        found = measure(arguments.depths[0], arguments.kinds[0])
        if os.environ["RANK"] == "0":
            print(json.dumps(found), flush=True)
        torch.distributed.barrier()
        os._exit(0)  # gloo's threads abort an interpreter that ends (pytorch/pytorch#179291)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(arguments.processes), __file__]
    for depth in arguments.depths:
        for kind in arguments.kinds:
            subprocess.run([*launch, str(depth), "--kinds", kind], check=True)


if __name__ == "__main__":
    main()

"""CPU seconds until a compiled step has been taken, by depth and by what is compiled as one.

python benchmarks/compile.py                S/2's width, depths 4 and 12, blocks and objective
python benchmarks/compile.py blocks 12      one of them, in this process
"""

import dataclasses
import json
import os
import subprocess
import sys
import time

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # so that all of it is counted

import torch
from sides import make_config

from selfalign.backbones.sit.sizes import SIZES
from selfalign.benchmark.measure import StepBenchmark


def measure(region: str, depth: int) -> dict[str, object]:
    """Compile and take the first steps."""
    torch.set_num_threads(1)
    SIZES["S"] = dataclasses.replace(SIZES["S"], depth=depth)
    settings = {"training.compile": True, "training.compile_region": region}
    step = StepBenchmark(make_config("sra-dts-as", "S/2", 4, 16, 2, **settings))
    begun, spent = time.perf_counter(), sum(os.times()[:4])
    step()
    seconds, spent = time.perf_counter() - begun, sum(os.times()[:4]) - spent
    again = min(step() for _ in range(3))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {
        "region": region,
        "depth": depth,
        "first_step_seconds": round(seconds, 1),
        "first_step_cpu_seconds": round(spent, 1),
        "later_step_seconds": round(again, 3),
        "graphs": graphs,
    }


def main() -> None:
    """See the module."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))), flush=True)
        return
    for region in ("blocks", "objective"):
        for depth in (4, 12):
            subprocess.run([sys.executable, __file__, region, str(depth)], check=True)


if __name__ == "__main__":
    main()

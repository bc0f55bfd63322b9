"""How soon commands answer: seconds and imports of help, refusals, and a run's first step.

    python benchmarks/startup.py [--repetitions N]

Each command runs in a process of its own, with the files in the system's cache; medians count. Torch's
own import is measured beside them, in turn.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

COMMANDS = {
    "--help": "--help",
    "--version": "--version",
    "recipes": "recipes",
    "train --help": "train --help",
    "train sra-dts-as --help": "train sra-dts-as --help",
    "a refused option of train": "train sra-dts-as --out x --nope 1",
    "a refused value of train": "train sra-dts-as --out x --views.partition spiral",
    "sample --help": "sample --help",
    "evaluate --help": "evaluate --help",
    "prepare --help": "prepare --help",
    "study paper --help": "study paper --help",
    "bench step --help": "bench step --help",
}
FIRST_STEP = (
    "train sra-dts-as --data.name digits --model.size tiny --training.steps 1 --training.log-every 1 "
    "--training.batch-size 8 --training.heldout-samples 10 --training.trackers --out"
)
HEAVY = ("torch", "numpy", "scipy", "sklearn", "torchvision", "matplotlib", "accelerate")


def seconds(*command: str) -> float:
    """Of a process."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - started


def heavy_imports(words: str) -> list[str]:
    """Which of the heavy libraries a command imports."""
    code = (
        "import sys, contextlib, io\n"
        "from selfalign.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    try: main(sys.argv[1:])\n"
        "    except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout.replace("'", '"')))


def first_step() -> float:
    """Seconds until a new run has made its first step and says so."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "-m", "selfalign", *FIRST_STEP.split(), f"{folder}/run"]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step 1/1"):
                    break
            taken = time.perf_counter() - started
            process.stdout.read()
    return taken


def main() -> None:
    """Measure everything in turn and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=7)
    repetitions = parser.parse_args().repetitions
    measures: dict[str, Callable[[], float]] = {
        name: lambda words=words: seconds(sys.executable, "-m", "selfalign", *words.split())  # type: ignore[misc]
        for name, words in COMMANDS.items()
    }
    measures["import torch"] = lambda: seconds(sys.executable, "-c", "import torch")
    measures["first step of a run"] = first_step
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repetitions):
        for name, measure in measures.items():
            taken[name].append(measure())
    print("| command | seconds [range] | heavy imports |\n| --- | --- | --- |")
    for name, values in taken.items():
        listed = ", ".join(heavy_imports(COMMANDS[name])) or "none" if name in COMMANDS else ""
        spread = f"[{min(values):.2f}, {max(values):.2f}]"
        print(f"| `{name}` | {statistics.median(values):.2f} {spread} | {listed} |")


if __name__ == "__main__":
    main()

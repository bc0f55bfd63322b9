"""The command line: parses, calls, prints. The only part that speaks to a person or exits."""

import os
import signal
import sys
from collections.abc import Callable, Sequence

import torch

from selfalign.cli.bench import bench_command
from selfalign.cli.console import console
from selfalign.cli.evaluate import evaluate_command
from selfalign.cli.prepare import prepare_command
from selfalign.cli.sample import sample_command
from selfalign.cli.study import study_command
from selfalign.cli.train import recipes_command, train_command
from selfalign.errors import AgreedError, UserError
from selfalign.processes import leave

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train_command, "train a recipe, or go on with a run"),
    "sample": (sample_command, "sample from a run"),
    "evaluate": (evaluate_command, "measure a run or a set of samples"),
    "prepare": (prepare_command, "encode a data set once, into files that training reads fast"),
    "study": (study_command, "run a grid of variants and seeds, and report on it"),
    "bench": (bench_command, "measure or estimate what a step or a sample costs"),
    "recipes": (recipes_command, "list the recipes and what sets them apart"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for what a person got wrong, 128+n for signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "WORLD_SIZE" in os.environ and not torch.accelerator.is_available():
        # Without this, accelerate takes each of torchrun's processes on CPUs for the only one.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            console.print("usage: selfalign COMMAND …\n")
            for name, (_, summary) in COMMANDS.items():
                console.print(f"  {name:10} {summary}")
            console.print("\nwhat a command takes: selfalign COMMAND --help")
            return 0
        if arguments[0] not in COMMANDS:
            raise UserError(f"command is {arguments[0]!r}: allowed are {', '.join(COMMANDS)}")
        code = COMMANDS[arguments[0]][0](arguments[1:])
        leave()
        return code
    except UserError as error:
        if isinstance(error, AgreedError):
            leave()
            if os.environ.get("RANK", "0") != "0":
                return 2  # the first process says it
        line = " ".join(str(error).split())
        print(f"selfalign: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("selfalign: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE

"""`selfalign completion`: what a shell needs to complete commands, recipes and options."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from selfalign.cli.bench import EstimateArguments, StepArguments
from selfalign.cli.bench import SampleArguments as BenchSampleArguments
from selfalign.cli.diff import DiffArguments
from selfalign.cli.evaluate import EvaluateArguments
from selfalign.cli.export import ExportArguments
from selfalign.cli.import_ import ImportArguments
from selfalign.cli.inspect import InspectArguments
from selfalign.cli.prepare import PrepareArguments
from selfalign.cli.report import ReportArguments
from selfalign.cli.sample import SampleArguments
from selfalign.cli.study import StudyArguments
from selfalign.cli.tree import options_of
from selfalign.errors import UserError
from selfalign.recipes import RECIPES, recipe
from selfalign.study.grids import GRIDS

SHELLS = ("bash", "zsh", "tcsh")


def completion_command(arguments: Sequence[str]) -> int:
    """`selfalign completion bash|zsh|tcsh`."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UserError(
            f"selfalign completion takes a shell: allowed are {', '.join(SHELLS)}; as in: "
            'eval "$(selfalign completion bash)"'
        )
    tyro.cli(_commands(), prog="selfalign", args=["--tyro-print-completion", arguments[0]])
    return 0


def _commands() -> Any:
    """All commands as one parser, which nothing is parsed with."""
    return _choice(
        {
            "train": _choice({name: _training(name) for name in RECIPES}),
            "sample": SampleArguments,
            "evaluate": EvaluateArguments,
            "import": ImportArguments,
            "export": ExportArguments,
            "inspect": InspectArguments,
            "prepare": PrepareArguments,
            "study": _choice(dict.fromkeys(GRIDS, StudyArguments)),
            "report": ReportArguments,
            "diff": DiffArguments,
            "bench": _choice(
                {
                    "step": StepArguments,
                    "sample": BenchSampleArguments,
                    "estimate": EstimateArguments,
                }
            ),
        }
    )


def _training(recipe_name: str) -> Any:
    """What `selfalign train RECIPE` takes."""
    tree = options_of(recipe(recipe_name))
    fields = [("out", Path), ("config", Annotated[type(tree), tyro.conf.arg(name="")])]
    return dataclasses.make_dataclass("TrainArguments", fields)


def _choice(commands: dict[str, Any]) -> Any:
    """A parser that takes the name of one of several others."""
    named = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items()]
    return Union[tuple(named)]  # noqa: UP007

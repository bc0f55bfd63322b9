"""The command line: parses, calls, prints. The only part that speaks to a person or exits.

Commands and what they need are imported when they are called for, so that help and refusals come at once.
"""

import contextlib
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from keyword import iskeyword

from selfalign.cli.interruption import (
    GO_ON,
    end_at_once_if_interrupted_again,
    interruptible,
    show_any_text,
)
from selfalign.environment import check_environment, forget_others, is_first_process
from selfalign.errors import AgreedError, UserError, told_by_machine
from selfalign.names import printable
from selfalign.settings import OPS

COMMANDS = {
    "train": "train a recipe, or go on with a run",
    "sample": "sample from a run",
    "evaluate": "measure a run or a set of samples",
    "import": "make a run of released weights",
    "export": "write a run's model as other projects read it",
    "inspect": "look into a run or a released checkpoint: what it learnt, what it saw",
    "prepare": "encode a data set once, into files that training reads fast",
    "study": "run a grid of variants and seeds, and report on it",
    "report": "compare runs on one page",
    "diff": "print the settings in which two runs or config files differ",
    "bench": "measure or estimate what a step or a sample costs",
    "recipes": "list the recipes and what sets them apart",
    "completion": "print what a shell needs to complete commands and options",
}
"""Each is a module NAME of this package with a function NAME_command(arguments) -> exit code."""
SHARED = frozenset(["train", "evaluate"])
"""Commands whose work the processes of a launcher (torchrun, accelerate launch) share; others are done by
the first of them alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for what a person got wrong, 128+n for signal n."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_any_text()
    agreed = True
    try:
        code = _run(words)
    except UserError as error:
        agreed, code = isinstance(error, AgreedError), 2
        # What all processes know, the first one says.
        if not agreed or is_first_process():
            _say_error(str(error))
    except KeyboardInterrupt as interruption:
        agreed, code = False, 128 + getattr(interruption, "number", signal.SIGINT)
        if arguments is None:
            end_at_once_if_interrupted_again(code)
        how = GO_ON.get(words[0] if words else "", "")
        if is_first_process():
            _say(f"interrupted{how and ': '}{how}")
    except BrokenPipeError:
        agreed, code = False, 128 + signal.SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        told = told_by_machine(error)
        if told is None:
            raise  # a bug of ours, and its traceback is what helps
        agreed, code = False, 2
        _say_error(told)
    if "torch" in sys.modules:
        from selfalign.processes import end_shared_process

        end_shared_process(code, agreed)
    return code


def _say_error(text: str) -> None:
    _say(f"error: {printable(text)}")


def _say(text: str) -> None:
    # A terminal that is gone, a full disk, a closed stream: the exit code says it, too.
    with contextlib.suppress(OSError, ValueError):
        print(f"selfalign: {text}", file=sys.stderr, flush=True)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        from selfalign import __version__

        print(f"selfalign {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise UserError(f"command is {name!r}: allowed are {', '.join(COMMANDS)}")
    check_environment()
    if name in ("evaluate", "sample"):
        # Also as a whole: torchrun takes --num for the beginning of an option of its own.
        rest = [re.sub("^--num-samples(?==|$)", "--num", word) for word in rest]
    _choose_ops(rest)
    # A new run has it among its settings; one that goes on has it in its config.json.
    _load_plugins(rest, keep=name == "train" and "--resume" not in rest)
    # A module cannot be called as a word of Python is.
    module = importlib.import_module(f"selfalign.cli.{name}{'_' * iskeyword(name)}")
    command = getattr(module, f"{name}_command")
    with interruptible():
        if name not in SHARED:
            if not is_first_process():
                return 0
            forget_others()
        return int(command(rest))


def _usage() -> str:
    listed = "\n".join(f"  {name:10} {summary}" for name, summary in COMMANDS.items())
    return (
        f"usage: selfalign COMMAND …\n\n{listed}\n\n"
        "what a command takes: selfalign COMMAND --help\n"
        "every command also takes\n"
        "  --ops auto|torch|cpu   operations by compiled kernels where there are some (auto), by torch, or\n"
        "                         by the CPU's kernels or not at all (also: SELFALIGN_OPS)\n"
        "  --plugins FILE.py …    files that register parts of their own; they are run\n"
        "selfalign --version      print the version"
    )


def _choose_ops(words: list[str]) -> None:
    """Take `--ops NAME` out of a command's words, for this process and those that it starts."""
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == "--ops":
            value = value if equals else next(iter(words[index + 1 :]), "")
            if value not in OPS:
                raise UserError(f"--ops is {value!r}: allowed are {', '.join(OPS)}")
            del words[index : index + (1 if equals else 2)]
            os.environ["SELFALIGN_OPS"] = value
            if "selfalign.ops" in sys.modules:  # it has read the variable already
                from selfalign import ops

                ops.use(value, "--ops")
            return


def _load_plugins(words: list[str], keep: bool) -> None:
    """Run the files after `--plugins`, so that their parts are choices of other options.

    Args:
        words: of the command; the option and its files are taken out unless they are kept.
        keep: for commands that have such an option themselves.
    """
    if "--plugins" not in words:
        return
    from selfalign.parts import load_plugin

    first = words.index("--plugins")
    files = []
    for word in words[first + 1 :]:
        if word.startswith("-") or not word.endswith(".py"):
            break
        files.append(word)
    if not files:
        raise UserError("--plugins names no file: needed are one or more names that end in .py")
    for file in files:
        load_plugin(file)
    if not keep:
        del words[first : first + 1 + len(files)]

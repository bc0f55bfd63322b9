"""Stop signals, and what is done with text that a terminal cannot show."""

import contextlib
import ctypes
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from selfalign.errors import Interrupted, told_by_machine
from selfalign.names import printable
from selfalign.signals import StopSignals, stop_signals

GO_ON = {
    "train": "if it has made a step, go on with `selfalign train --resume DIR`",
    "sample": "nothing was written; the same command makes the same samples",
    "evaluate": "finished samples are kept; the same command goes on",
    "prepare": "finished files are kept; the same command goes on",
    "import": "nothing was written; the same command makes the same run",
    "export": "nothing was written; the same command writes the same files",
    "inspect": "numbers of finished analyses are kept; the same command makes the rest and the page",
    "report": "nothing was written; the same command makes the same page",
    "bench": "nothing was written; the same command measures anew",
    "study": "its runs stop at checkpoints; the same command goes on",
}
"""What a command that was interrupted leaves, and how to go on."""
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within this block other stop signals end what is done as Ctrl-C does, so that everything is tidied up.

    Raises:
        Interrupted: on any of them, at any place of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change how signals are handled
        return

    heard = StopSignals()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if heard.hear(number) != "again":  # which would only disturb the tidying up
            raise Interrupted(number)

    previous = {number: signal.signal(number, interrupt) for number in stop_signals()}
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if "LOCAL_RANK" in os.environ or _is_accelerates_child():
        _end_with_launcher()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_at_once_if_interrupted_again(code: int) -> None:
    """For a program that is ending: another stop signal ends it at once, with the same exit code."""
    for number in stop_signals():
        signal.signal(number, lambda number, frame: os._exit(code))


def _is_accelerates_child() -> bool:
    """Whether `accelerate launch` has started this process alone, which no variable says."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:  # not Linux, or the parent is gone
        return False
    return any(
        word.startswith(b"accelerate.commands.") or os.path.basename(word) == b"accelerate"  # noqa: PTH119
        for word in words[:4]
    )


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM when the launcher dies, which would leave its processes behind."""
    if sys.platform == "linux":
        launcher = os.getppid()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it died meanwhile; 1 may be a launcher too, in a container
            raise Interrupted(signal.SIGTERM)


def show_any_text() -> None:
    """Escape what the terminal's encoding lacks; warnings of ours, and full disks in threads, are a line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    theirs = warnings.formatwarning

    def one_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if category is not UserWarning or "selfalign" not in filename:
            return theirs(message, category, filename, lineno, line)
        return f"selfalign: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = one_line
    # PYTHONWARNINGS=error is meant for other people's code: what we warn of goes on.
    warnings.filterwarnings("default", category=UserWarning, module="selfalign")
    in_full = threading.excepthook

    def of_thread(failed: threading.ExceptHookArgs) -> None:
        error = failed.exc_value
        told = told_by_machine(error) if isinstance(error, Exception) else None
        if told is None:
            in_full(failed)
        elif told not in told_of_threads:
            told_of_threads.add(told)
            print(f"selfalign: warning: {printable(told)}", file=sys.stderr)

    told_of_threads: set[str] = set()
    threading.excepthook = of_thread

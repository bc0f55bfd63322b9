"""The signals that ask a program to stop, and whether one that comes later is another wish."""

import os
import signal
from typing import Literal


def stop_signals() -> tuple[int, ...]:
    """Ctrl-C, SIGTERM, and the hang-up of a terminal unless that is ignored, as under nohup."""
    found: list[int] = [signal.SIGINT, signal.SIGTERM]
    hang_up: int | None = getattr(signal, "SIGHUP", None)  # Windows has none
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        found.append(hang_up)
    return tuple(found)


class StopSignals:
    """Those that this process has been sent, told apart from the same one again."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._parent = os.getppid()

    def hear(self, number: int) -> Literal["first", "again", "another"]:
        """Note a signal; `another` is a second wish to stop, which is to be granted at once.

        A terminal that closes hangs up several times, by the kernel and by the shell; Linux tells of a
        launcher's death once for each of its threads. What torchrun passes on comes once: its processes have
        sessions of their own, which a terminal's Ctrl-C does not reach.
        """
        if self.first is None:
            self.first = number
            return "first"
        hung_up = number == getattr(signal, "SIGHUP", None)
        orphaned = number == signal.SIGTERM and os.getppid() != self._parent
        return "again" if hung_up or orphaned else "another"

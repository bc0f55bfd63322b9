"""The signals that ask a program to stop, and whether one that comes later is another wish."""

import os
import signal
import time
from typing import Literal

PASSED_ON_SECONDS = 2.0
"""Within which a launcher passes on what a terminal has sent to all processes already."""


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
        self._begun = 0.0
        self._parent = os.getppid()
        self._launched = "LOCAL_RANK" in os.environ

    def hear(self, number: int) -> Literal["first", "again", "another"]:
        """Note a signal; `another` is a second wish to stop, which is to be granted at once.

        A terminal that closes hangs up several times, torchrun passes on what its processes have been sent
        already, and Linux tells of a launcher's death once for each of its threads.
        """
        if self.first is None:
            self.first, self._begun = number, time.monotonic()
            return "first"
        hung_up = number == getattr(signal, "SIGHUP", None)
        orphaned = number == signal.SIGTERM and os.getppid() != self._parent
        soon = time.monotonic() - self._begun < PASSED_ON_SECONDS
        return "again" if hung_up or orphaned or (self._launched and soon) else "another"

"""The exceptions of the package: what a person can get wrong, and being told to stop."""

import re
import signal
import traceback

_LONGEST_REASON = 200
_PEER_IS_GONE = re.compile(r"(closed|reset) by peer|Broken pipe|\bgloo\b.*[Tt]imed out")
"""How gloo says so; other ways of torch.distributed have exceptions of their own (DistBackendError)."""


class UserError(Exception):
    """What was wrong, where, and what is allowed, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


class AgreedError(UserError):
    """A UserError that every process of a job has raised: one of them is enough to print it."""


def told_by_machine(error: Exception) -> str | None:
    """What an exception says of the machine: memory, disks, files, packages, other processes; or None.

    The last resort, for what nobody has put into words where it arose.
    """
    said = str(error).partition("\n")[0]
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which may not have been imported
        or (isinstance(error, RuntimeError) and "allocate memory" in said)
    ):
        return (
            f"memory does not suffice ({said or 'MemoryError'}): smaller batches, images or models "
            "need less"
        )
    if isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or _PEER_IS_GONE.search(said)
    ):
        return f"another process of the job has ended or is out of reach ({said}): see what it said"
    if isinstance(error, OSError):
        name = "" if error.filename is None else f"{error.filename}: "
        return f"{name}{error.strerror or said or type(error).__name__}"
    if package := _failed_import(error):
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        return (
            f"{package} cannot be imported ({type(error).__name__}: {reason}): its installation is "
            "damaged, or an environment variable that it reads is wrong"
        )
    return None


def _failed_import(error: Exception) -> str | None:
    """The package of others that was being imported when this was raised."""
    package = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "<module>":
            package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return None if package in ("selfalign", "__main__") else package


class Interrupted(KeyboardInterrupt):
    """A signal that asks to stop (`selfalign.signals`).

    Args:
        number: of the signal; the command exits with 128 more.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

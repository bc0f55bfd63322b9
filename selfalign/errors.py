"""The exceptions of the package: what a person can get wrong, and being told to stop."""

import signal


class UserError(Exception):
    """What was wrong, where, and what is allowed, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


class AgreedError(UserError):
    """A UserError that every process of a job has raised: one of them is enough to print it."""


def told_by_machine(error: Exception) -> str | None:
    """What an exception says of the machine: its memory, its disks, its files; None for any other.

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
    if isinstance(error, OSError):
        name = "" if error.filename is None else f"{error.filename}: "
        return f"{name}{error.strerror or said or type(error).__name__}"
    return None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM.

    Args:
        number: of the signal; the command exits with 128 more.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

"""The exceptions of the package: what a person can get wrong, and being told to stop."""

import signal


class UserError(Exception):
    """What was wrong, where, and what is allowed, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


class AgreedError(UserError):
    """A UserError that every process of a job has raised: one of them is enough to print it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM.

    Args:
        number: of the signal; the command exits with 128 more.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

"""The one exception for what a person can get wrong."""


class UserError(Exception):
    """What was wrong, where, and what is allowed, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


class AgreedError(UserError):
    """A UserError that every process of a job has raised: one of them is enough to print it."""

"""Whether the data of a run is what it was when the run began."""

from pathlib import Path

from selfalign.data.contents import ABSENT, Recorded, describe_changes
from selfalign.data.source import DataSource
from selfalign.errors import UserError

REPAIRED = 0.1
"""Share of a run's images that may have another size without being asked about."""


def check_data(
    folder: Path, recorded: Recorded, source: DataSource, accept: bool, remedy: str
) -> str:
    """What to say of data that has changed and can still be used; empty if it is the same.

    Args:
        folder: of the run.
        recorded: what the run recorded of its data.
        source: the data as it is now, opened with `recorded`.
        accept: whether images may be gone, or many of another size.
        remedy: ends the message where this is other data.

    Raises:
        UserError: it cannot be used, or has not been accepted.
    """
    if source.fingerprint == recorded.fingerprint:
        return ""
    then, now = recorded.contents, source.contents
    changes = "" if then is None or now is None else describe_changes(then, now)
    changed = f"the data of {folder} has changed since it was started"
    if then is None or now is None or not changes or set(now.sizes) == {ABSENT}:
        raise UserError(
            f"{changed} (fingerprint {source.fingerprint} instead of {recorded.fingerprint}); {remedy}"
        )
    differ = sum(a != b for a, b in zip(then.sizes, now.sizes, strict=True))
    repaired = ABSENT not in now.sizes and differ <= REPAIRED * len(now.sizes)
    if not repaired and not accept:
        raise UserError(
            f"{changed}: {changes}; with --data.accept-changes the run goes on with what is there, in its "
            "order"
        )
    return f"{changed}: {changes}"

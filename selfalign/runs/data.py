"""A run's data later on: where it is, and whether it is what it was when the run began."""

from pathlib import Path

from selfalign.data.contents import ABSENT, Recorded, describe_changes
from selfalign.data.datasets import open_data
from selfalign.data.source import DataSource
from selfalign.errors import UserError
from selfalign.sections import DataConfig

REPAIRED = 0.1
"""Share of a run's images that may have another size without being asked about."""


def open_recorded(config: DataConfig, recorded: Recorded) -> DataSource:
    """A run's data, with its images in the places that they had when it began.

    Args:
        config: the run's, perhaps with another root.
        recorded: what the run recorded of its data.

    Raises:
        UserError: what `open_data` raises; where nothing is there, it says how to name the place.
    """
    try:
        return open_data(config, recorded)
    except UserError as error:
        if Path(config.root).exists():
            raise
        raise UserError(f"{error}; if the data has moved, --data.root names its place") from error


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

"""Files and folders that are there whole, or not at all, and where those that can be made again are kept."""

import contextlib
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from selfalign.errors import UserError

LOCK = ".lock"
"""Name of the file by which a process holds a folder."""


def publish(partial: Path, path: Path) -> None:
    """Rename a file, or a folder of files, once all of it is on the disk."""
    contents = list(partial.iterdir()) if partial.is_dir() else []
    for written in (*contents, partial):
        _flush_to_disk(written)
    partial.replace(path)
    _flush_to_disk(path.parent)  # the new name, too, has to survive a power failure


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(kind: str) -> Path:
    """The folder `kind` in `$SELFALIGN_CACHE`, or in `~/.cache/selfalign`; without a home, one of its own."""
    if root := os.environ.get("SELFALIGN_CACHE"):
        return Path(root) / kind
    try:
        home = Path.home()
    except RuntimeError:  # neither $HOME nor a user of this number, as in containers
        return Path(_passing_folder().name) / kind
    return home / ".cache" / "selfalign" / kind


@functools.cache
def _passing_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder that goes with the process. Not one that others could have made: kernels in it are run."""
    return tempfile.TemporaryDirectory(prefix="selfalign-")


def real_path(path: Path) -> Path:
    """Where a path leads, links followed; also for loops of links, at which `Path.resolve` fails."""
    return Path(os.path.realpath(path))


def write_whole(path: Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Write a file or a folder of files beside its place and rename it, so that it is whole or absent.

    Args:
        path: the file, or the folder.
        write: writes it, under the name that it is given.
        needed: its bytes, where that is known and worth saying on a full disk.

    Raises:
        UserError: the disk is full or not writable.
    """
    partial = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        publish(partial, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {reason(error, path.parent, needed)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            remove(partial)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a `.npz`, whole or not at all. Raises UserError as `write_whole` does."""
    import numpy as np  # not above: what reads and writes records alone answers sooner without it

    needed = sum(array.nbytes for array in arrays.values())
    write_whole(path, lambda partial: np.savez(partial, allow_pickle=False, **arrays), needed)


def is_full(error: UserError) -> bool:
    """Whether it was for want of space that a file could not be written."""
    return getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def reason(error: BaseException, folder: Path, needed: int | None = None) -> str:
    """Why something could not be written into a folder, and where the disk is full, what is needed.

    Args:
        error: what writing raised.
        folder: where to.
        needed: bytes of what was to be written, where that is known.
    """
    said = (isinstance(error, OSError) and error.strerror) or str(error)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return said
    if needed is not None and free < needed:
        said += f"; it needs {_amount(needed)}, and {_amount(free)} are free there"
    return said


def _amount(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 10**5 else f"{count / 1e3:,.1f} kB"


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written into, or made, before any work is done. Makes nothing.

    Raises:
        UserError: it cannot.
    """
    place = _existing(folder)
    if not place.is_dir():
        raise UserError(f"{folder} cannot be written into: {place} is not a folder")
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.lstat()  # is it a name that the file system takes?
        # Tried, not asked: a read-only disk, a full one and /proc have the bits of any other folder.
        with tempfile.TemporaryDirectory(dir=place, prefix=".", suffix=".partial"):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written into: {reason(error, place)}; --out names another place"
        ) from error


def require_no_folder(*files: Path) -> None:
    """Refuse to write files where folders are, before any work is done.

    Raises:
        UserError: one is; the message names it.
    """
    for file in files:
        if file.is_dir():
            raise UserError(
                f"{file} is a folder, in a file's place: move it away, or name another --out"
            )


def require_room(folder: Path, needed: int, what: str) -> None:
    """Refuse what does not fit a disk, before any work is done.

    Args:
        folder: where to; it need not be there yet.
        needed: bytes.
        what: is to be written.

    Raises:
        UserError: the message says what is needed and what is free.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise UserError(
            f"{what} need {_amount(needed)} in {folder}, where {_amount(free)} are free"
        )


def _existing(folder: Path) -> Path:
    """The folder itself, or what is there of the way to it."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if os.path.lexists(place))


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_left_over(path: Path) -> bool:
    """Whether this is what interrupted writing left: everything is written under such names first."""
    return path.name.startswith(".") and ".partial" in path.name


def sweep(folder: Path) -> None:
    """Remove what interrupted writing left in a folder. For a folder that nobody else writes into."""
    for left_over in filter(is_left_over, list(folder.glob(".*"))):
        remove(left_over)


@contextlib.contextmanager
def locked(folder: Path, busy: str | None, name: str = LOCK) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is missing, by a file in it.

    What a process leaves behind that is killed is no obstacle.

    Args:
        folder: which.
        busy: what the folder is where another process has it; None waits for that to end.
        name: of the file.

    Raises:
        UserError: another process has it, it is not writable, or the file system has no locks.
    """
    lock = FileLock(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=busy is None)
    except Timeout as error:
        raise UserError(f"{folder} {busy}") from error
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{folder} cannot be written: {reason(error, folder)}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / name).unlink()  # while it is held; who waits for it looks for that
        lock.release()

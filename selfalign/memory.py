"""Memory: what steps free is kept for the next one, and what cannot fit is refused before it is asked for."""

import ctypes
import os
import sys

from selfalign.errors import UserError

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> None:
    """Tell glibc not to return freed memory to the system, on Linux; elsewhere do nothing.

    A step on a CPU frees its activations and allocates the same ones again. By default glibc hands
    them back and gets fresh pages, which the kernel has to clear one by one: about 70,000 to 140,000
    page faults per step of SiT-S/2, a twentieth of its time (benchmarks/step.md).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, -1)
        mallopt(_TOP_PAD, 2 * _LARGEST_MMAP_THRESHOLD)


def require_memory(needed: int, what: str) -> None:
    """Refuse what this machine's memory cannot hold, before any work is done.

    Args:
        needed: bytes.
        what: is to be held.

    Raises:
        UserError: the message says what is needed and what there is. Nothing where that is not known.
    """
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return
    if needed > there:
        raise UserError(
            f"{what} need {needed / 1e6:,.0f} MB of memory, and this machine has {there / 1e6:,.0f} MB"
        )

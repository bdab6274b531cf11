"""Resident memory of runs on the CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
LARGE = 2**30  # bytes


def trim_memory() -> bool:
    """Give memory that is free but still resident back to the system; whether there was any.

    Batches of ragged captions ask for blocks of ever other sizes, which fragment glibc's heap: a run's resident memory
    grows to several times what it uses. Does nothing with another C library.
    """
    trim = _malloc_trim()
    return trim is not None and bool(trim(0))


@functools.lru_cache(maxsize=1)
def keep_memory() -> bool:
    """Have large blocks, once freed, kept for the next ones; whether the C library can do that.

    glibc gets every block of more than 32 MB from the system and gives it back, whose pages are then filled with zeros
    again and again: a third to a half of the CPU time of a convolutional image tower. Threads that start later share
    one heap, since what they would have of their own holds no large blocks. For the rest of the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all([mallopt(M_MMAP_THRESHOLD, LARGE), mallopt(M_TRIM_THRESHOLD, LARGE), mallopt(M_ARENA_MAX, 1)])


@functools.lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None

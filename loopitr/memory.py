"""Resident memory of runs on the CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
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
    again and again: a third to a half of the CPU time of a convolutional image tower. For the rest of the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(M_TRIM_THRESHOLD, LARGE))


@functools.lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None

"""Settings of the C library's heap, for runs on the CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
LARGE = 2**30  # bytes


def trim_memory() -> bool:
    """Return free memory of the heap to the system; returns whether there was any.

    Batches with captions of different lengths need blocks of many sizes, which fragment glibc's heap, so that the
    resident memory of a run grows to several times what it uses. With other C libraries this does nothing.
    """
    trim = _malloc_trim()
    return trim is not None and bool(trim(0))


@functools.lru_cache(maxsize=1)
def keep_memory() -> bool:
    """Make the heap keep large freed blocks, for the rest of the process; returns whether the C library can do that.

    By default, glibc gets every block of more than 32 MB from the system and returns it when it is freed. Filling its
    pages with zeros each time takes a third to a half of the CPU time of a convolutional image tower. Threads that
    start later share one heap, since a heap of their own would hold no large blocks.
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

"""Resident memory of runs on the CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim_memory() -> bool:
    """Give memory that is free but still resident back to the system; whether there was any.

    Batches of ragged captions ask for blocks of ever other sizes, which fragment glibc's heap: a run's resident memory
    grows to several times what it uses. Does nothing with another C library.
    """
    trim = _malloc_trim()
    return trim is not None and bool(trim(0))


@functools.lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None

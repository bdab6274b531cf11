"""By which a changed file is told: its size and the time of its last change."""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone

Stamp = tuple[int, int]  # the size in bytes, and the time of the last change in microseconds since 1970
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
EARLIEST, LATEST = -62_135_596_800_000_000, 253_402_300_799_999_999  # The years 1 to 9999, as far as dates go.


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file; a time that no date can express counts as the nearest one that can be expressed."""
    return status.st_size, min(max(status.st_mtime_ns // 1000, EARLIEST), LATEST)


def time_of(stamp: Stamp) -> datetime:
    """The time of the last change."""
    return EPOCH + timedelta(microseconds=stamp[1])


def micros_of(time: datetime) -> int:
    """A time as in a stamp."""
    return (time - EPOCH) // timedelta(microseconds=1)

"""The signal handling of DataLoader workers."""

from __future__ import annotations

import os
import signal
from typing import Any

STAY = 30  # the seconds that a worker continues after SIGTERM


def leave_signals_to_the_run(_: int) -> None:
    """A `worker_init_fn` that keeps workers alive while a run that was told to stop finishes its step.

    Ctrl-C and SIGTERM usually reach the workers too, but the run still needs their batches. So Ctrl-C is ignored, and
    after SIGTERM a worker continues until the run closes it, for at most `STAY` seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _end)
        signal.signal(signal.SIGTERM, _end_later)


def _end_later(*_: Any) -> None:
    signal.alarm(STAY)


def _end(*_: Any) -> None:
    os._exit(0)  # Any other exit status would raise an error in the run.

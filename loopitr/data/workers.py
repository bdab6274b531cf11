"""What every DataLoader worker does first."""

from __future__ import annotations

import os
import signal
from typing import Any

STAY = 30  # seconds that a worker goes on for once it was told to end


def leave_signals_to_the_run(_: int) -> None:
    """A `worker_init_fn`: whoever stops a run sends the signal to its workers too, whose batches the run still needs.

    Ctrl-C is ignored. After SIGTERM a worker goes on until the run closes it, or for `STAY` seconds at most.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _end)
        signal.signal(signal.SIGTERM, _end_later)


def _end_later(*_: Any) -> None:
    signal.alarm(STAY)


def _end(*_: Any) -> None:
    os._exit(0)  # Another status would raise an error in the run.

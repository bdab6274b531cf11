"""The end of a forked process, and what it does before."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence


def wait(pid: int, seconds: float = 120) -> int:
    """The exit status, negative for a signal that killed it; a process that takes longer is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} took over {seconds} s")


def wait_for_all(pids: Sequence[int], seconds: float) -> list[int]:
    """The exit statuses of processes; all are killed if they take longer."""
    end, left = time.monotonic() + seconds, list(pids)
    try:
        statuses = []
        for pid in pids:
            left.remove(pid)
            statuses.append(wait(pid, end - time.monotonic()))
        return statuses
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.005)

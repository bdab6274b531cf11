"""A process that builds a cache and is killed in the middle of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from forked import fork
from helpers.waiting import wait, wait_until


def killed_in_the_third(build: Callable[[Callable[[], None]], object], log: Path) -> None:
    """Fork a process that calls `build(step)`, and kill it when it calls `step()` for the third time."""
    mark, steps = log.with_name("third"), []

    def step() -> None:
        steps.append(1)
        if len(steps) == 3:
            mark.touch()
            signal.pause()

    pid = fork(lambda: build(step), log)
    try:
        wait_until(mark.exists)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL

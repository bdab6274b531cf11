"""Stops a run on SIGTERM or Ctrl-C: all ranks finish their step, save a checkpoint, and end with one line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loopitr.distributed import world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = 3.0  # seconds; a signal that follows sooner is a copy that a launcher passed on, not a second request
LATER = 0.05  # seconds after which a signal is sent again that arrived where nothing can be raised


class Stopped(SystemExit):
    """The run was stopped by a signal; `code` is the exit status that shells use for it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number

    @property
    def name(self) -> str:
        """The name of the signal, such as `SIGTERM`."""
        return signal.Signals(self.signal).name

    def line(self, step: int, folder: Path) -> str:
        """The line to log; `step` is that of the newest checkpoint in `folder`, 0: there is none."""
        start = f"from step {step}, saved in {folder}" if step else "from the start: no step is saved yet"
        return f"stopped by {self.name}: --resume continues {start}"


class Stopping:
    """Holds a signal until the run can stop. Within `with stopping:` a signal does not end the process.

    A second signal, some seconds after the first, raises `Stopped` immediately.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._at_once = False
        self._earlier: dict[int, Any] = {}
        self._earlier_hook: Any = None
        self._again: threading.Timer | None = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # Python handles signals only there.
            self._earlier = {number: signal.signal(number, self._receive) for number in SIGNALS}
            self._earlier_hook, sys.unraisablehook = sys.unraisablehook, self._dropped
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        if self._earlier:
            sys.unraisablehook = self._earlier_hook
        if self._again is not None:
            self._again.cancel()

    @contextlib.contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
        """A context in which a signal raises `Stopped` immediately, since nothing has to be finished first."""
        before, self._at_once = self._at_once, allowed
        try:
            if allowed:
                self.check()
            yield
        finally:
            self._at_once = before

    def check(self) -> None:
        """Stop if a signal has arrived.

        Raises:
            Stopped: a signal has arrived.
        """
        if self.signal:
            raise Stopped(self.signal)

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        again = self.signal and now - self._since > AGAIN
        if not self.signal:
            self.signal, self._since = number, now
        if again or self._at_once:
            self._at_once = False  # Code that cleans up must not be interrupted.
            raise Stopped(self.signal)

    def _dropped(self, dropped: Any) -> None:
        """Python's hook for exceptions in destructors and in callbacks of weak references, which end nothing."""
        if not isinstance(dropped.exc_value, Stopped):
            self._earlier_hook(dropped)
            return
        self._at_once = True
        self._again = threading.Timer(LATER, os.kill, (os.getpid(), self.signal))
        self._again.daemon = True
        self._again.start()


class AcrossRanks:
    """Exchanges small numbers between the CPUs of all ranks, so that no step waits for a GPU."""

    def __init__(self, device: torch.device) -> None:
        """All ranks must construct it together."""
        self._group: Any = None  # the default group
        if world_size() > 1 and device.type != "cpu":
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=4))

    def highest(self, *values: int) -> list[int]:
        """The largest value on any rank, for each of `values`."""
        if world_size() == 1:
            return list(values)
        highest = torch.tensor(values)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
        return [int(value) for value in highest]

"""A run that is told to stop (SIGTERM, Ctrl-C) makes its step, saves and ends with one line: all ranks alike."""

from __future__ import annotations

import contextlib
import signal
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
AGAIN = 3.0  # seconds; launchers pass on what the terminal has sent already, which is not a second wish to stop


class Stopped(SystemExit):
    """The run was told to stop, and has. Its `code` is the exit status that shells give the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number

    @property
    def name(self) -> str:
        """Such as `SIGTERM`."""
        return signal.Signals(self.signal).name

    def line(self, step: int, folder: Path) -> str:
        """What to say where the newest checkpoint in `folder` is of this step; 0: there is none."""
        whence = f"from step {step}, saved in {folder}" if step else "from the start: no step is saved yet"
        return f"stopped by {self.name}: --resume goes on {whence}"


class Stopping:
    """Keeps a signal until the run can stop. Within `with stopping:` the process does not end by itself.

    A second signal some seconds after the first raises `Stopped` at once, wherever the run is.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._at_once = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other.
            self._earlier = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
        """Within it a signal raises `Stopped` where it arrives: there is nothing to finish first."""
        before, self._at_once = self._at_once, allowed
        try:
            if allowed:
                self.check()
            yield
        finally:
            self._at_once = before

    def check(self) -> None:
        """
        Raises:
            Stopped: a signal has come.
        """
        if self.signal:
            raise Stopped(self.signal)

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        again = self.signal and now - self._since > AGAIN
        if not self.signal:
            self.signal, self._since = number, now
        if again or self._at_once:
            self._at_once = False  # What cleans up is not to be stopped.
            raise Stopped(self.signal)


class AcrossRanks:
    """The ranks agree on small numbers between their CPUs, so that no step waits for a GPU."""

    def __init__(self, device: torch.device) -> None:
        """All ranks make it together."""
        self._group: Any = None  # the default one
        if world_size() > 1 and device.type != "cpu":
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=4))

    def highest(self, *values: int) -> list[int]:
        """Of each value, the largest that any rank has."""
        if world_size() == 1:
            return list(values)
        highest = torch.tensor(values)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
        return [int(value) for value in highest]

"""How long the parts of an evaluation take."""

from __future__ import annotations

import time

import torch


class Clock:
    """Seconds by name, of work that is done: a GPU is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, dict[str, float]()
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

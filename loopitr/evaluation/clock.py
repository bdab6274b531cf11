"""Times the parts of an evaluation."""

from __future__ import annotations

import time

import torch


class Clock:
    """Seconds by name in `laps`, measured after the GPU has finished its work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, dict[str, float]()
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Store the time since the last lap under `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

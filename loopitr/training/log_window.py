"""The values logged since the last line of the log, whose means the next line shows; checkpoints keep them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class LogWindow:
    """Collects scalars by name; they stay on their device until a line is logged."""

    def __init__(self, state: Mapping[str, list[float]] | None = None, device: torch.device | None = None) -> None:
        """`state` is what `state()` returned when a checkpoint was saved."""
        self.values = {
            name: list(torch.tensor(values, dtype=torch.float32, device=device).unbind())
            for name, values in (state or {}).items()
        }

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().float().reshape(()))

    def state(self) -> dict[str, list[float]]:
        """The values for a checkpoint, exact in JSON."""
        return {name: torch.stack(values).tolist() for name, values in self.values.items()}

    def close(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over the window and the ranks (some terms cover a rank's own queries only); empties the window.

        Values that are not finite come from skipped steps and do not count; a name without other values is left out.
        """
        means = [_finite_mean(torch.stack(values)) for values in self.values.values()]
        averaged = accelerator.reduce(torch.stack(means), "mean").tolist()
        named = dict(zip(self.values, averaged, strict=True))
        self.values = {}
        return {name: value for name, value in named.items() if value - value == 0}


def _finite_mean(values: Tensor) -> Tensor:
    finite = values.isfinite()
    return torch.where(finite, values, 0.0).sum() / finite.sum()

"""What a run says of itself as it goes: a line of means every few steps, in its history, its tracker and its watch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from loopitr.distributed import first_rank
from loopitr.objective.parts import StepOutput
from loopitr.training.checkpoints import Progress
from loopitr.training.log_window import LogWindow
from loopitr.training.reporting import History, named_values
from loopitr.training.watch import Watch


class RunLog:
    """The log of a run that stands at `progress`."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        progress: Progress,
        *,
        watch: Watch,
        log: Callable[[str], None] = print,
    ) -> None:
        """`log`: where warnings go."""
        self.accelerator, self.watch = accelerator, watch
        self.window = LogWindow(progress.windows[0] if progress.windows else None, device=accelerator.device)
        self.history = History(folder, keep=progress.rows, log=log) if accelerator.is_main_process else None

    def add(self, output: StepOutput) -> None:
        """A batch's losses and metrics; they stay where they are."""
        self.window.add(named_values(output))

    def write(self, progress: Progress, more: dict[str, float]) -> dict[str, float]:
        """Log the means since the last time, and `more`; returns all of it."""
        values = self.window.close(self.accelerator) | more
        self.record(progress.step, values)
        self.watch.look(progress, values)
        return values

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log `values` as they are."""
        if self.history is not None:
            self.history.add(step, values)
        self.accelerator.log(values, step=step)

    def keep(self, progress: Progress) -> None:
        """Force the history onto the disk, and note in `progress` what goes on from here.

        Raises:
            OSError: on all ranks: it cannot be written.
        """
        progress.windows = [self.window.state()]
        progress.rows = first_rank(partial(_keep, self.history))


def _keep(history: History | None) -> int:
    assert history is not None  # on the main process, which is the first rank
    history.sync()
    return len(history.rows)

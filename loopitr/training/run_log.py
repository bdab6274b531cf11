"""The log of a run: means over a few steps, for its history, its tracker and its warnings."""

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
    """The log of a run, continued from `progress`."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        progress: Progress,
        *,
        watch: Watch,
        log: Callable[[str], None] = print,
    ) -> None:
        """`log`: a function for warnings."""
        self.accelerator, self.watch = accelerator, watch
        self.window = LogWindow(progress.windows[0] if progress.windows else None, device=accelerator.device)
        self.history = History(folder, keep=progress.rows, log=log) if accelerator.is_main_process else None

    def add(self, output: StepOutput) -> None:
        """Add the losses and metrics of a batch; they stay on their device."""
        self.window.add(named_values(output))

    def write(self, progress: Progress, more: dict[str, float]) -> dict[str, float]:
        """Log the means since the last call, and the values in `more`; returns both."""
        values = self.window.close(self.accelerator) | more
        self.record(progress.step, values)
        self.watch.look(progress, values)
        return values

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log `values`."""
        if self.history is not None:
            self.history.add(step, values)
        self.accelerator.log(values, step=step)

    def keep(self, progress: Progress) -> None:
        """Sync the history to the disk, and store in `progress` what a resumed run needs of the log.

        Raises:
            OSError: the history cannot be written (raised on all ranks).
        """
        progress.windows = [self.window.state()]
        progress.rows = first_rank(partial(_keep, self.history))


def _keep(history: History | None) -> int:
    assert history is not None  # The main process, which is the first rank, has one.
    history.sync()
    return len(history.rows)

"""When a run saves checkpoints, and what it does if the disk is full."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from loopitr.training.checkpoints import HasState, Progress, save_checkpoint
from loopitr.training.options import TrainOptions
from loopitr.training.run_folder import CHECKPOINTS


class Saver:
    """Saves checkpoints at intervals of steps and minutes; a failure is logged, and saving is tried again later."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        options: TrainOptions,
        *,
        scheduler: HasState,
        log: Callable[[str], None] = print,
    ) -> None:
        self.accelerator, self.folder, self.options = accelerator, folder / CHECKPOINTS, options
        self.scheduler, self.log = scheduler, log
        self.step = 0  # the step of the newest checkpoint
        self.last = time.monotonic()

    def is_late(self) -> bool:
        """Whether `checkpoint_minutes` have passed, by this process's clock."""
        minutes = self.options.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self.last >= 60 * minutes

    def is_due(self, step: int) -> bool:
        """Whether `checkpoint_every` asks for a checkpoint after this step."""
        every = self.options.checkpoint_every
        return every > 0 and step % every == 0

    def save(self, progress: Progress, *, first: Callable[[], None] = lambda: None, needed: bool = False) -> bool:
        """Save a checkpoint, on all ranks together; returns whether it was written.

        Args:
            first: writes what has to be on the disk before it.
            needed: raise an error if it cannot be written, since there will be no later attempt.

        Raises:
            OSError: it could not be written, and is `needed`.
        """
        self.last = time.monotonic()
        try:
            first()
            save_checkpoint(
                self.accelerator,
                self.folder,
                progress,
                keep=self.options.keep_checkpoints,
                scheduler=self.scheduler,
            )
        except OSError as error:
            kept = f"the one of step {self.step} is kept" if self.step else "there is none yet"
            text = f"step {progress.step}: no checkpoint could be written to {self.folder} ({reason(error)}), {kept}"
            if needed:
                raise OSError(f"{text}; free space and continue with --resume") from error
            self.log(f"warning: {text}; the run continues and tries again")
            return False
        self.step = progress.step
        return True


def reason(error: OSError) -> str:
    """The reason in words, such as `No space left on device`."""
    return error.strerror or str(error)

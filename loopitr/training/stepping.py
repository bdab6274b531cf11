"""An optimiser step: forward and backward passes of its batches, gradient clipping, and the step if all is finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.optim.lr_scheduler import LRScheduler

from loopitr.data import Batch
from loopitr.distributed import average_gradients
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.parts import StepOutput
from loopitr.training.divergence import StepGuard
from loopitr.training.options import TrainOptions
from loopitr.training.sharding import SHARDED


class Stepper:
    """Accumulates the gradients of `options.accumulation` batches, then steps the optimiser and the schedule."""

    def __init__(
        self,
        accelerator: Accelerator,
        prepared: Any,
        objective: LoopObjective,
        optimizer: Any,
        scheduler: LRScheduler,
        options: TrainOptions,
        *,
        folder: Path,
        total_steps: int,
        log: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            prepared, optimizer: what accelerate made of `objective` and of its optimiser.
            folder, log: where `StepGuard` reports the steps that it skips.
            total_steps: the run also stops when half of them are skipped in a row.
        """
        self.accelerator, self.prepared, self.objective = accelerator, prepared, objective
        self.optimizer, self.scheduler, self.options = optimizer, scheduler, options
        most = min(options.max_bad_steps, max(2, total_steps // 2))
        self.guard = StepGuard(accelerator, objective.model, optimizer, folder=folder, most_in_row=most, log=log)
        self.micro = 0  # how many batches of the current step have been accumulated

    def backward(self, batch: Batch, stage: dict[str, Any]) -> StepOutput:
        """Add a batch's gradients. `stage` is what else the objective is called with at this step, see `Gate.stage`."""
        accelerator, chunk_size = self.accelerator, self.options.chunk_size
        self.guard.start_batch(batch)
        inputs = send_to_device(batch.inputs, accelerator.device, non_blocking=True)
        self.micro += 1
        with nullcontext() if self.is_full and chunk_size is None else accelerator.no_sync(self.prepared):
            if chunk_size is None:
                # `prepared` enters autocast itself, except where weights are sharded.
                with accelerator.autocast() if accelerator.distributed_type in SHARDED else nullcontext():
                    output: StepOutput = self.prepared(**inputs, **stage)
                self._backward_from(output)
            else:
                output = cached_backward(
                    self.objective,
                    inputs,
                    chunk_size=chunk_size,
                    backward=self._backward_from,
                    autocast=accelerator.autocast,
                    **stage,
                )
        if self.is_full and chunk_size is not None:
            average_gradients(self._parameters)
        return output

    def _backward_from(self, output: StepOutput) -> None:
        self.guard.note(output)
        self.accelerator.backward(output.loss)  # It divides by the number of accumulated batches.

    @property
    def is_full(self) -> bool:
        """Whether the accumulated batches make a step."""
        return self.micro == self.options.accumulation

    @property
    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        """Clip the gradients and step. The schedule also counts the steps that the guard skips."""
        self.micro = 0
        sharded = self.accelerator.distributed_type in SHARDED  # accelerate then needs all parameters, in their order.
        parameters = self.prepared.parameters() if sharded else self._parameters
        self.guard.step(self.accelerator.clip_grad_norm_(parameters, self.options.clip))
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.objective.after_step()

"""Protection against divergence: steps that are not finite are skipped, and too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loopitr.data import Batch
from loopitr.distributed import all_sum
from loopitr.objective.parts import StepOutput
from loopitr.training.checkpoints import Progress
from loopitr.training.sharding import local_part

SKIPPED_STEPS = "skipped_steps.jsonl"
UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # each rank has all weights
LEAST_SCALE = 2.0**-8  # A gradient scaler, which begins at 2^16, comes down to this after 24 steps that it skips.
NAMED = 3  # So many images are named in a message; the file lists all.


def check_finite(model: nn.Module, *, step: int) -> None:
    """Call this on all ranks, as each may hold a shard of the weights.

    Raises:
        ValueError: a weight or a buffer of the model is not finite; the first one is named.
    """
    names, bad = [], []
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            names.append(name)
            bad.append(~torch.isfinite(local_part(tensor)).all())
    for name, is_bad in zip(names, all_sum(torch.stack(bad).float()).tolist(), strict=True):
        if is_bad:
            raise ValueError(
                f"the model has diverged: {name} is not finite at step {step}; lower the learning rate or use fp32"
            )


@dataclass
class _StepRecord:
    """What a step's warning would say. Tensors stay on their device until `StepGuard.settle` reads them."""

    losses: list[dict[str, Tensor]] = field(default_factory=list)  # of each batch of an accumulated step
    names: list[str] = field(default_factory=list)  # of its images
    bad: Tensor | None = None  # [] bool
    norm: Tensor | None = None  # [] of the gradient


class StepGuard:
    """Skips the optimiser steps whose loss or gradient is not finite, the same ones on all ranks.

    Whether to skip a step is decided on the gradients' device; the CPU reads the decisions only when something is
    logged, so that it does not wait for the GPU. The run folder's `skipped_steps.jsonl` lists the images of such steps.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        *,
        folder: Path,
        most_in_row: int,
        log: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            optimizer: the one that accelerate has prepared.
            most_in_row: so many skipped steps in a row stop the run; with 0, it is never stopped.
            log: receives a warning about each skipped step.
        """
        self.accelerator, self.optimizer, self.log = accelerator, optimizer, log
        self.folder, self.most_in_row = folder, most_in_row
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.statistics = [
            buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None
        ]
        self.before: list[Tensor] = []  # the statistics before the step
        self.unread: list[_StepRecord] = []  # the steps since `settle`
        self.current = _StepRecord()

    def start_batch(self, batch: Batch) -> None:
        """Call this before the forward pass of every batch."""
        if not self.current.losses and self.statistics:
            self.before = [buffer.clone() for buffer in self.statistics]
        self.current.names += batch.names

    def note(self, output: StepOutput) -> None:
        """Call this with every batch's losses."""
        terms = {name: value.detach() for name, value in output.terms.items()}
        self.current.losses.append({"loss": output.loss.detach(), **terms})

    def step(self, norm: Tensor | None) -> None:
        """Step the optimiser unless a loss or `norm`, the norm of the whole gradient, is not finite."""
        record, self.current = self.current, _StepRecord()
        bad = ~torch.stack([losses["loss"].float() for losses in record.losses]).isfinite().all()
        scales = self.accelerator.scaler is not None  # A gradient scaler skips steps itself until it finds its scale.
        if norm is not None and not scales:
            record.norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            bad = bad | ~record.norm.isfinite().to(bad.device)
        record.bad = all_sum(bad.float()) > 0
        self.unread.append(record)
        if not scales and self.accelerator.distributed_type in UNSHARDED:
            self._step_unless(record.bad)
        elif scales or not bool(record.bad):
            self.optimizer.step()
        for buffer, before in zip(self.statistics, self.before):
            buffer.copy_(torch.where(record.bad.to(buffer.device), before, buffer))

    def _step_unless(self, bad: Tensor) -> None:
        """Step without a wait for the device: a fused optimiser reads the flag there."""
        unwrapped = self.optimizer.optimizer
        unwrapped.found_inf = bad.float()
        try:
            self.optimizer.step()
        finally:
            del unwrapped.found_inf

    def settle(self, progress: Progress) -> None:
        """Read which steps were skipped, warn about them, and count them in `progress`.

        Raises:
            ValueError: `most_in_row` steps in a row were skipped, or a gradient scaler skips them all; on all ranks.
        """
        records, self.unread = self.unread, []
        if not records:
            return
        flags = torch.stack([record.bad for record in records if record.bad is not None]).tolist()
        first = progress.step - len(records) + 1
        for step, record, bad in zip(range(first, progress.step + 1), records, flags, strict=True):
            progress.bad_in_row = progress.bad_in_row + 1 if bad else 0
            if not bad:
                continue
            progress.bad_steps += 1
            line = self._write(step, record)
            if progress.bad_in_row <= NAMED:
                self.log(f"warning: step {step} is skipped: {line}")
            if 0 < self.most_in_row <= progress.bad_in_row:
                raise ValueError(
                    f"the run is stopped at step {step}, the last of {progress.bad_in_row} in a row without a finite "
                    f"gradient: {line}; lower the learning rate or use fp32"
                )

        scaler = self.accelerator.scaler
        if scaler is not None and self.most_in_row and (scale := scaler.get_scale()) < LEAST_SCALE:
            raise ValueError(
                f"the run is stopped at step {progress.step}: its gradients in fp16 are not finite at any scale (the "
                f"last is {scale:.2g}), so no step is made; use bf16 or fp32, or lower the learning rate"
            )

    def _write(self, step: int, record: _StepRecord) -> str:
        """Add a skipped step to the file; returns a description of it."""
        losses = [{name: float(value) for name, value in batch.items()} for batch in record.losses]
        names = gather_object(record.names)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in losses[-1].items())
        norm = "unknown" if record.norm is None else f"{float(record.norm):.3g}"
        path = self.folder / SKIPPED_STEPS
        if self.accelerator.is_main_process:
            row = {"step": step, "losses": [_as_text(batch) for batch in losses], "gradient": norm, "images": names}
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                self.log(f"warning: {path} cannot be written ({error.strerror})")
        return f"{shown}, gradient {norm}; images {_listed(names)} (all in {path})"


def _as_text(losses: dict[str, float]) -> dict[str, str]:
    """The values as text, since JSON has no NaN."""
    return {name: f"{value:.6g}" for name, value in losses.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

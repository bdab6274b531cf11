"""A run that diverges: its bad steps are left out, and it is stopped before its model is validated or kept."""

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
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # weights are whole on each rank
NAMED = 3  # images in a message; the file has all


def check_finite(model: nn.Module, *, step: int) -> None:
    """Call this on all ranks: each may hold a shard.

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
class _Made:
    """A step, or what there is of it: its losses stay on their device until they are looked at."""

    losses: list[dict[str, Tensor]] = field(default_factory=list)  # of each batch of an accumulated step
    names: list[str] = field(default_factory=list)
    bad: Tensor | None = None
    norm: Tensor | None = None


class StepGuard:
    """Leaves out the optimiser steps whose loss or gradient is not finite, the same ones on all ranks.

    Whether a step was left out is decided where the gradients are, and looked at when something is logged, so that the
    CPU does not wait for the GPU. The images of such a step are listed in the run folder's `skipped_steps.jsonl`.
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
            optimizer: accelerate's.
            most_in_row: so many steps in a row without a finite gradient stop the run; 0: none does.
            log: where it says which step was left out.
        """
        self.accelerator, self.optimizer, self.log = accelerator, optimizer, log
        self.folder, self.most_in_row = folder, most_in_row
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.statistics = [
            buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None
        ]
        self.before: list[Tensor] = []  # the statistics before the step
        self.made: list[_Made] = []  # steps that nobody has looked at yet
        self.now = _Made()

    def start_batch(self, batch: Batch) -> None:
        """Call this before the forward pass of every batch."""
        if not self.now.losses and self.statistics:
            self.before = [buffer.clone() for buffer in self.statistics]
        self.now.names += batch.names

    def note(self, output: StepOutput) -> None:
        """Call this with every batch's losses."""
        terms = {name: value.detach() for name, value in output.terms.items()}
        self.now.losses.append({"loss": output.loss.detach(), **terms})

    def drop(self) -> None:
        """The batches since the last step make none."""
        self.now = _Made()

    def step(self, norm: Tensor | None) -> None:
        """The optimiser's step, or none; `norm` is the gradient's, of all parameters."""
        made, self.now = self.now, _Made()
        bad = ~torch.stack([losses["loss"].float() for losses in made.losses]).isfinite().all()
        scales = self.accelerator.scaler is not None  # It leaves steps out itself, while it looks for its scale.
        if norm is not None and not scales:
            made.norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            bad = bad | ~made.norm.isfinite().to(bad.device)
        made.bad = all_sum(bad.float()) > 0
        self.made.append(made)
        if not scales and self.accelerator.distributed_type in PLAIN:
            self._step_unless(made.bad)
        elif scales or not bool(made.bad):
            self.optimizer.step()
        for buffer, before in zip(self.statistics, self.before):
            buffer.copy_(torch.where(made.bad.to(buffer.device), before, buffer))

    def _step_unless(self, bad: Tensor) -> None:
        """A fused optimiser looks at the flag itself, on its device."""
        bare = self.optimizer.optimizer
        bare.found_inf = bad.float()
        try:
            self.optimizer.step()
        finally:
            del bare.found_inf

    def settle(self, progress: Progress) -> None:
        """Count in `progress` the steps that were left out, name them, and stop a run that makes no others.

        Raises:
            ValueError: `most_in_row` in a row; on all ranks.
        """
        made, self.made = self.made, []
        if not made:
            return
        flags = torch.stack([each.bad for each in made if each.bad is not None]).tolist()
        first = progress.step - len(made) + 1
        for step, each, bad in zip(range(first, progress.step + 1), made, flags, strict=True):
            progress.bad_in_row = progress.bad_in_row + 1 if bad else 0
            if not bad:
                continue
            progress.bad_steps += 1
            line = self._write(step, each)
            if progress.bad_in_row <= NAMED:
                self.log(f"warning: step {step} is left out: {line}")
            if 0 < self.most_in_row <= progress.bad_in_row:
                raise ValueError(
                    f"the run is stopped at step {step}, the last of {progress.bad_in_row} in a row without a finite "
                    f"gradient: {line}; lower the learning rate or use fp32"
                )

    def _write(self, step: int, made: _Made) -> str:
        """Add a step to the file; returns what it was in words."""
        losses = [{name: float(value) for name, value in each.items()} for each in made.losses]
        names = gather_object(made.names)
        shown = ", ".join(f"{name} {value:.3g}" for name, value in losses[-1].items())
        norm = "unknown" if made.norm is None else f"{float(made.norm):.3g}"
        path = self.folder / SKIPPED_STEPS
        if self.accelerator.is_main_process:
            row = {"step": step, "losses": [_as_text(each) for each in losses], "gradient": norm, "images": names}
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                self.log(f"warning: {path} cannot be written ({error.strerror})")
        return f"{shown}, gradient {norm}; images {_listed(names)} (all in {path})"


def _as_text(losses: dict[str, float]) -> dict[str, str]:
    """JSON has no NaN."""
    return {name: f"{value:.6g}" for name, value in losses.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

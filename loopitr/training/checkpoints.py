"""Training checkpoints: each is complete or absent, the newest is known by its step, older ones are deleted."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.constants import RNG_STATE_NAME
from accelerate.utils.other import load

from loopitr.distributed import first_rank

STATE_FILE, SCHEDULER_FILE = "progress.json", "scheduler.json"


@dataclass
class Progress:
    """Where a run stands: optimiser `step`, `epoch`, batches done in it, best validation so far (its score, its dual
    head's, its step), rows of its history, what was skipped (counts by reason, and the reason of each file) and how
    many captions were cut. `places` has epoch and batch of every rank: streams of different length end at different
    batches. `similarity_weight`: of the reranking score, as last fitted. `teaching_since`: the step from which
    distillation counts, None while it does not; `has_taught`: whether it ever did; `best_lead`: how far the teacher
    was ahead at most."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    best_dual: float | None = None
    best_step: int | None = None
    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_files: dict[str, str] = field(default_factory=dict)
    truncated: int = 0
    places: list[list[int]] = field(default_factory=list)
    similarity_weight: float | None = None
    teaching_since: int | None = None
    has_taught: bool = False
    best_lead: float | None = None


class HasState(Protocol):
    """What a scheduler is here: something whose state is numbers, texts, lists and dictionaries."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def save_checkpoint(
    accelerator: Accelerator, folder: Path, progress: Progress, *, keep: int, scheduler: HasState | None = None
) -> Path:
    """Write `folder/step-N` and delete all but the newest `keep`; a killed process leaves only a `.partial` folder.

    The scheduler's state is JSON: accelerate would load what is registered with it from a pickle, which can run code.
    """
    final = folder / f"step-{progress.step:08d}"
    partial = final.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    progress = replace(progress, places=gather_object([[progress.epoch, progress.batch]]))
    if accelerator.is_main_process:
        if scheduler is not None:
            (partial / SCHEDULER_FILE).write_text(json.dumps(scheduler.state_dict()))
        (partial / STATE_FILE).write_text(json.dumps(asdict(progress)))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _all(folder)[: -max(1, keep)]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, folder: Path, *, scheduler: HasState | None = None) -> Progress | None:
    """Restore the newest complete checkpoint into what `accelerator` has prepared; None when there is none.

    Every rank gets its own place in the data; if their number is another than before, all get rank 0's.

    Raises:
        ValueError: it is of another model or optimiser, damaged, or holds something else than tensors and numbers.
    """
    complete = _all(folder)
    if not complete:
        return None
    newest = complete[-1]
    try:
        if scheduler is not None:
            first_rank(partial(_convert_older, newest))
        accelerator.load_state(str(newest))
        if scheduler is not None:
            scheduler.load_state_dict(json.loads((newest / SCHEDULER_FILE).read_text()))
        random_states = newest / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl"
        if random_states.is_file():
            load(random_states)  # accelerate says nothing where it cannot, and then the run would be another one
    except Exception as error:  # A file that is damaged raises any error of its format.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{newest} does not fit this run's model, or is damaged: {reason}") from error
    progress = _progress(complete[-1])
    if len(progress.places) == accelerator.num_processes:
        progress.epoch, progress.batch = progress.places[accelerator.process_index]
    return progress


def _convert_older(checkpoint: Path) -> None:
    """An older version left the scheduler to accelerate, which would run what a pickle says; make it JSON."""
    older = checkpoint / "custom_checkpoint_0.pkl"
    if older.is_file() and not (checkpoint / SCHEDULER_FILE).is_file():
        state = torch.load(older, weights_only=True)
        (checkpoint / SCHEDULER_FILE).write_text(json.dumps(state))
        older.unlink()


def newest_progress(folder: Path) -> Progress | None:
    """Where the newest complete checkpoint stands, without loading it; None when there is none."""
    complete = _all(folder)
    return _progress(complete[-1]) if complete else None


def _progress(checkpoint: Path) -> Progress:
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    return Progress(**state)


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if (p / STATE_FILE).is_file() and p.suffix != ".partial")

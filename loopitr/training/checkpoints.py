"""Training checkpoints: each is whole or absent, the newest is known by its step, older ones are deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.constants import FSDP_MODEL_NAME, RNG_STATE_NAME
from accelerate.utils.other import load

from loopitr.distributed import each_rank, first_rank
from loopitr.training.durable import PARTIAL, as_os_error, fault, sync, write_file, write_manifest
from loopitr.training.sharding import parts_of_state

STATE_FILE, SCHEDULER_FILE = "progress.json", "scheduler.json"
REPLACED, DELETED = ".replaced", ".deleted"


@dataclass
class Progress:
    """Where a run stands: optimiser `step`, `epoch`, batches done in it, best validation so far (its score, its
    dual head's, its step), rows of its history, what was skipped (counts by reason, and the reason of each file)
    and how many captions were cut. `places` has epoch and batch of every rank: streams of different length end at
    different batches. `similarity_weight`: of the reranking score, as last fitted. `teaching_since`: the step from
    which distillation counts, None while it does not; `has_taught`: whether it ever did; `best_lead`: how far the
    teacher was ahead at most. `windows`: of every rank the values that wait for the next log line; of a run at
    work, its own alone. `validates_next`: a validation was due. `bad_steps`: steps left out since their loss or
    gradient was not finite, the last `bad_in_row` of them in a row. `watch`: what the run has noticed of itself
    (`watch.py`)."""

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
    windows: list[dict[str, list[float]]] = field(default_factory=list)
    validates_next: bool = False
    bad_steps: int = 0
    bad_in_row: int = 0
    watch: dict[str, float] = field(default_factory=dict)


class HasState(Protocol):
    """What a scheduler is here: something whose state is numbers, texts, lists and dictionaries."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole, and where the run stood."""

    path: Path
    progress: Progress


def save_checkpoint(
    accelerator: Accelerator, folder: Path, progress: Progress, *, keep: int, scheduler: HasState | None = None
) -> Path:
    """Write `folder/step-N` and delete all but the newest `keep`.

    The files are written to a `.partial` folder, forced onto the disk, listed with their digests in `manifest.json`,
    and the folder renamed: whatever kills the process, the checkpoint is whole or not there, and the one before is.
    The scheduler's state is JSON: accelerate would load what is registered with it from a pickle, which can run code.

    Raises:
        OSError: on all ranks: one of them could not write. Nothing of this checkpoint is left, and all others are.
    """
    final = folder / f"step-{progress.step:08d}"
    partial_folder = final.with_suffix(PARTIAL)
    if accelerator.is_main_process:
        _remove_remains(folder)
    accelerator.wait_for_everyone()
    try:
        for part in parts_of_state(accelerator, partial_folder):
            each_rank(partial(_save, part, partial_folder))
        progress = replace(progress, places=gather_object([[progress.epoch, progress.batch]]))
        progress.windows = gather_object([progress.windows[0] if progress.windows else {}])
        first_rank(partial(_complete, partial_folder, final, progress, scheduler))
    except OSError:
        if accelerator.is_main_process:
            shutil.rmtree(partial_folder, ignore_errors=True)  # the little space it has is wanted
        raise
    if accelerator.is_main_process:
        for old in _all(folder)[: -max(1, keep)]:
            _remove(old)
    accelerator.wait_for_everyone()
    return final


def _save(part: Callable[[], object], folder: Path) -> None:
    with as_os_error():
        part()
        for path in sorted(folder.rglob("*")):
            sync(path)


def _complete(folder: Path, final: Path, progress: Progress, scheduler: HasState | None) -> None:
    if scheduler is not None:
        write_file(folder / SCHEDULER_FILE, json.dumps(scheduler.state_dict()))
    write_file(folder / STATE_FILE, json.dumps(asdict(progress)))
    write_manifest(folder)
    replaced = final.with_suffix(REPLACED)
    if (final / STATE_FILE).is_file():  # No folder takes the place of another; a crash in between leaves the replaced.
        final.rename(replaced)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    sync(final.parent)
    _remove(replaced)


def newest_checkpoint(folder: Path, *, log: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint whose files are those that were written; None where there is none at all.

    A damaged one is named in the log and renamed to `step-N.damaged`. One of an older version, without a manifest,
    counts as whole.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_all(folder)):
        problem = fault(path)
        if problem is None:
            try:
                found = Checkpoint(path, _progress(path))
            except (OSError, ValueError, TypeError) as error:
                problem = f"{STATE_FILE} cannot be read ({error})"
        if problem is None:
            for old, why in damaged:
                aside = old.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                old.rename(aside)
                log(f"warning: the checkpoint {old} is damaged ({why}): it is now {aside.name}, {path.name} is used")
            return found
        damaged.append((path, problem))
    if damaged:
        listed = "; ".join(f"{path.name}: {why}" for path, why in damaged)
        raise ValueError(f"no checkpoint in {folder} is whole ({listed}); delete {folder} to begin anew")
    return None


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, *, scheduler: HasState | None = None) -> Progress:
    """Restore a checkpoint into what `accelerator` has prepared.

    Every rank gets its own place in the data; if their number is another than before, all get rank 0's.

    Raises:
        ValueError: it is of another model, optimiser or kind of run (under FSDP or not), damaged, or holds something
            else than tensors and numbers.
    """
    is_sharded = (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file()
    if is_sharded != accelerator.is_fsdp2:
        raise ValueError(f"{checkpoint} is of a run {'under' if is_sharded else 'without'} FSDP: launch it so")
    try:
        if scheduler is not None:
            first_rank(partial(_convert_older, checkpoint))
        accelerator.load_state(str(checkpoint))
        if scheduler is not None:
            scheduler.load_state_dict(json.loads((checkpoint / SCHEDULER_FILE).read_text()))
        random_states = checkpoint / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl"
        if random_states.is_file():
            load(random_states)  # accelerate says nothing where it cannot, and then the run would be another one
    except Exception as error:  # A file that is damaged raises any error of its format.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{checkpoint} does not fit this run's model, or is damaged: {reason}") from error
    progress = _progress(checkpoint)
    same = len(progress.places) == accelerator.num_processes
    if same:
        progress.epoch, progress.batch = progress.places[accelerator.process_index]
    progress.windows = progress.windows[accelerator.process_index :][:1] if same else []
    return progress


def _convert_older(checkpoint: Path) -> None:
    """An older version left the scheduler to accelerate, which would run what a pickle says; make it JSON."""
    older = checkpoint / "custom_checkpoint_0.pkl"
    if older.is_file() and not (checkpoint / SCHEDULER_FILE).is_file():
        state = torch.load(older, weights_only=True)
        (checkpoint / SCHEDULER_FILE).write_text(json.dumps(state))
        older.unlink()


def _progress(checkpoint: Path) -> Progress:
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    return Progress(**state)


def _all(folder: Path) -> list[Path]:
    """Oldest first. Of one step, what was to be replaced comes before what replaced it."""
    found = [p for p in folder.glob("step-*") if (p / STATE_FILE).is_file() and p.suffix in ("", REPLACED)]
    return sorted(found, key=lambda p: (p.stem, p.suffix == ""))


def _remove(checkpoint: Path) -> None:
    """Rename it first, so that what is half deleted is no checkpoint."""
    if checkpoint.exists():
        deleted = checkpoint.with_name(checkpoint.name + DELETED)
        checkpoint.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def _remove_remains(folder: Path) -> None:
    """What killed processes left behind while they wrote or deleted."""
    for suffix in (PARTIAL, DELETED):
        for path in folder.glob(f"step-*{suffix}"):
            shutil.rmtree(path, ignore_errors=True)
    for replaced in folder.glob(f"step-*{REPLACED}"):
        if (replaced.with_suffix("") / STATE_FILE).is_file():
            _remove(replaced)

"""Training checkpoints, written atomically; only the newest are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.constants import FSDP_MODEL_NAME, RNG_STATE_NAME
from accelerate.utils.other import load
from torch.optim.lr_scheduler import LambdaLR

from loopitr.distributed import each_rank, first_rank
from loopitr.durable import PARTIAL, as_os_error, fault, sync, write_file, write_manifest
from loopitr.objective.teachers import Frozen, OwnModel
from loopitr.reading import read_object
from loopitr.training.optimization import options_kept
from loopitr.training.sharding import parts_of_state

STATE_FILE, SCHEDULER_FILE, CONFIG = "progress.json", "scheduler.json", "config.yaml"
COUNTS = ("step", "epoch", "batch", "rows", "truncated", "bad_steps", "bad_in_row")  # of `Progress`
REPLACED, DELETED = ".replaced", ".deleted"


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step, epoch, batch: optimiser steps, epochs, and batches of the current epoch that are done.
        best, best_dual, best_step: the best validation so far: its score, its dual head's score, and its step.
        rows: the number of rows of the history.
        skipped, skipped_files: the number of skipped files by reason, and the reason of each file.
        truncated: the number of captions that were cut.
        places: epoch and batch of every rank, since streams of different length end at different batches.
        similarity_weight: the weight in the reranking score, as last fitted.
        teaching_since: the step from which distillation is on; None while it is off.
        has_taught: whether distillation has ever been on.
        best_lead: the largest lead of the teacher over the dual head so far.
        windows: the values of every rank for the next log line; while the run is going, only those of this rank.
        validates_next: whether a validation is due.
        bad_steps, bad_in_row: the number of steps left out because their loss or gradient was not finite, and how many
            of the latest steps these are.
        watch: the memory of `Watch`.
    """

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
    """A scheduler: its state consists of numbers, texts, lists and dictionaries, so that it can be saved as JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """An undamaged checkpoint, and the progress of its run."""

    path: Path
    progress: Progress


def save_checkpoint(
    accelerator: Accelerator, folder: Path, progress: Progress, *, keep: int, scheduler: HasState | None = None
) -> Path:
    """Write `folder/step-N`, then delete all but the newest `keep` checkpoints.

    The files are written to a `.partial` folder, synced to the disk and listed with their digests in `manifest.json`;
    then the folder is renamed. So the checkpoint is complete or does not exist, whatever kills the process. The
    scheduler's state is saved as JSON, because accelerate would save it as a pickle, which can run code when loaded.

    Raises:
        OSError: a rank could not write (raised on all ranks). This checkpoint is removed; earlier ones are unchanged.
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
            shutil.rmtree(partial_folder, ignore_errors=True)  # The disk may be full, so its space is needed.
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
    options = final.parent.parent / CONFIG
    if options.is_file():  # They show later whether the checkpoint is of the run that it is found in.
        shutil.copyfile(options, folder / CONFIG)
    write_manifest(folder)
    replaced = final.with_suffix(REPLACED)
    # A folder cannot replace another; after a crash, the replaced one is still used.
    if (final / STATE_FILE).is_file():
        final.rename(replaced)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    sync(final.parent)
    _remove(replaced)


def newest_checkpoint(folder: Path, *, log: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint that is not damaged; None: there is no checkpoint.

    Newer ones that are damaged are logged and renamed to `step-N.damaged`. Checkpoints of older versions have no
    manifest and are taken to be undamaged.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(_all(folder)):
        problem = fault(path)
        if problem is None:
            try:
                checkpoint = Checkpoint(path, _progress(path))
            except (OSError, ValueError, TypeError) as error:
                problem = f"{STATE_FILE} cannot be read ({error})"
        if problem is None:
            for old, why in damaged:
                aside = old.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                old.rename(aside)
                log(f"warning: the checkpoint {old} is damaged ({why}): it is now {aside.name}, {path.name} is used")
            return checkpoint
        damaged.append((path, problem))
    if damaged:
        listed = "; ".join(f"{path.name}: {why}" for path, why in damaged)
        raise ValueError(f"no checkpoint in {folder} is whole ({listed}); delete {folder} to begin anew")
    return None


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, *, scheduler: LambdaLR | None = None, teacher: OwnModel | None = None
) -> Progress:
    """Restore the state of everything that `accelerator` has prepared, and return the progress of the run.

    Every rank continues at its own place in the data; if the number of ranks has changed, all continue at rank 0's. The
    options of the optimiser, such as its learning rates, are not restored: they may have been changed.

    Args:
        teacher: that of a run whose options may have been changed; a frozen one keeps its weights.

    Raises:
        ValueError: it is damaged, of another model, optimiser or kind of run (with or without FSDP), or holds anything
            but tensors and numbers.
    """
    was_sharded = (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file()
    if was_sharded != bool(getattr(accelerator, "is_fsdp2", False)):
        kind = "with" if was_sharded else "without"
        raise ValueError(f"{checkpoint} is of a run {kind} FSDP: launch {kind} FSDP to resume it")
    weights = teacher.state_dict() if isinstance(teacher, Frozen) else {}
    own = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
    try:
        if scheduler is not None:
            first_rank(partial(_convert_older, checkpoint))
        with nullcontext() if scheduler is None else options_kept(scheduler):
            accelerator.load_state(str(checkpoint))
            if scheduler is not None:
                scheduler.load_state_dict(read_object(checkpoint / SCHEDULER_FILE))
        random_states = checkpoint / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl"
        if random_states.is_file():
            load(random_states)  # accelerate has ignored errors in this file, which would change the run.
    except Exception as error:  # Damaged files raise errors of many kinds.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{checkpoint} does not fit this run's model, or is damaged: {reason}") from error
    if isinstance(teacher, Frozen):
        teacher.load_state_dict(own)
    progress = _progress(checkpoint)
    same = len(progress.places) == accelerator.num_processes
    if same:
        progress.epoch, progress.batch = progress.places[accelerator.process_index]
    progress.windows = progress.windows[accelerator.process_index :][:1] if same else []
    return progress


def _convert_older(checkpoint: Path) -> None:
    """Convert the scheduler's state of an older version, a pickle that accelerate would run, to JSON."""
    older = checkpoint / "custom_checkpoint_0.pkl"
    if older.is_file() and not (checkpoint / SCHEDULER_FILE).is_file():
        state = torch.load(older, weights_only=True)
        (checkpoint / SCHEDULER_FILE).write_text(json.dumps(state))
        older.unlink()


def _progress(checkpoint: Path) -> Progress:
    progress = Progress(**read_object(checkpoint / STATE_FILE))
    for name in COUNTS:
        value = getattr(progress, name)
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value!r}")
    kinds = {"skipped": dict, "skipped_files": dict, "places": list, "windows": list, "watch": dict}
    for name, kind in kinds.items():
        if not isinstance(getattr(progress, name), kind):
            raise ValueError(f"{name} is {getattr(progress, name)!r}")
    if not all(isinstance(place, list) and [*map(type, place)] == [int, int] for place in progress.places):
        raise ValueError(f"places is {progress.places!r}")
    return progress


def _all(folder: Path) -> list[Path]:
    """All checkpoints, the oldest first; a replaced one comes before its replacement."""
    paths = [p for p in folder.glob("step-*") if (p / STATE_FILE).is_file() and p.suffix in ("", REPLACED)]
    return sorted(paths, key=lambda p: (p.stem, p.suffix == ""))


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, renamed first so that a partly deleted one is not taken for a checkpoint."""
    if checkpoint.exists():
        deleted = checkpoint.with_name(checkpoint.name + DELETED)
        checkpoint.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def _remove_remains(folder: Path) -> None:
    """Delete what processes left behind that were killed while they wrote or deleted checkpoints."""
    for suffix in (PARTIAL, DELETED):
        for path in folder.glob(f"step-*{suffix}"):
            if path.is_symlink():
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)
    for replaced in folder.glob(f"step-*{REPLACED}"):
        if (replaced.with_suffix("") / STATE_FILE).is_file():
            _remove(replaced)

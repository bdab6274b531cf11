"""The folder of a run: nobody else's while the run is at work, and an earlier run in it is kept."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from loopitr.distributed import first_rank
from loopitr.training.checkpoints import Progress, newest_checkpoint
from loopitr.training.durable import PARTIAL, write_file
from loopitr.training.folder_lock import LOCK, FolderLock
from loopitr.training.reporting import HISTORY, METRICS
from loopitr.training.resume_check import changed_options, stored_config

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Entered:
    """What was in a run's folder: the figures of a finished run with nothing left to do, or None; the checkpoint to go
    on from, or None; lines for the log."""

    finished: dict[str, Any] | None = None
    checkpoint: Path | None = None
    lines: tuple[str, ...] = ()


@contextlib.contextmanager
def run_folder(
    folder: Path,
    config: dict[str, Any],
    accelerator: Accelerator,
    total_steps: int,
    *,
    resume: bool,
    with_changes: bool = False,
) -> Iterator[Entered]:
    """Within it, `folder` is this run's alone; nothing is written there but the lock.

    An earlier run there is moved aside, unless it is resumed and has a checkpoint. Yields that checkpoint, and the
    metrics of a run that is resumed and has made its `total_steps` already: it is left as it is, with nothing to do.

    Args:
        config: the options of this run. Those of a resumed one must be the same, but for what changes nothing in it.
        with_changes: accept other options.

    Raises:
        ValueError: the folder holds something else than a run, another run is at work there, a finished one without a
            checkpoint is to go on, or one with other options, or one whose checkpoints are all damaged.
        OSError: the folder cannot be made or written to.
    """
    accelerator.wait_for_everyone()  # to have read model.init, which may lie there
    locks: list[FolderLock] = []
    try:
        asked = _Asked(resume, with_changes, total_steps, accelerator.num_processes)
        entered = first_rank(partial(_enter, folder, stored_config(config), locks, asked))
        for line in entered.lines:
            accelerator.print(line)
        yield entered
    finally:
        for lock in locks:
            lock.release()


@dataclass(frozen=True)
class _Asked:
    resume: bool
    with_changes: bool
    total_steps: int
    num_processes: int


def _enter(folder: Path, config: dict[str, Any], locks: list[FolderLock], asked: _Asked) -> Entered:
    check_run_folder(folder)  # before the lock is written there
    _locked(folder, locks)
    lines: list[str] = []
    total_steps = asked.total_steps
    newest = newest_checkpoint(folder / CHECKPOINTS, log=lines.append) if asked.resume else None
    progress = newest.progress if newest else None
    if asked.resume:
        changes = _changes(folder, config, progress, asked.num_processes)
        if changes and not asked.with_changes:
            raise ValueError(
                f"{folder} was begun with other options ({'; '.join(changes)}); resume it with its own, or accept "
                "these with --resume_with_changes"
            )
        lines += [f"resuming with a change: {change}" for change in changes]
        metrics = _finished(folder)
        done = metrics["training"]["steps"] if metrics and progress is None else progress.step if progress else 0
        if metrics is not None and done >= total_steps:
            return Entered(finished=metrics, lines=(f"{folder} has made its {done} steps: nothing to resume",))
        if metrics is not None and progress is None:
            raise ValueError(
                f"{folder} has made its {done} steps and has no checkpoint to make {total_steps} from; start from its "
                f"model with --model.init {folder} and another train.output_dir"
            )
        lines.append(f"resuming from {f'step {done}' if progress else f'scratch: no checkpoint in {folder}'}")
    if progress is None:
        # A run that was killed before its first checkpoint may have validated: its model is kept too.
        aside = move_aside(folder)
        if aside is not None:
            _locked(folder, locks)
            (aside / LOCK).unlink(missing_ok=True)
            cut_short = not asked.resume and _finished(aside) is None and any((aside / CHECKPOINTS).glob("*"))
            hint = f"; to go on with it: --train.output_dir {aside} --resume" if cut_short else ""
            lines.append(f"moved the earlier run in {folder} to {aside}{hint}")
    return Entered(checkpoint=newest.path if newest else None, lines=tuple(lines))


def store_config(folder: Path, config: dict[str, Any], *, step: int) -> None:
    """Write `config.yaml`, once the run is ready for its next step, which it makes after `step` others.

    Options that are changed stay in `config.before-STEP.yaml`: an evaluation asks what a run was trained on.
    """
    path, config = folder / CONFIG, stored_config(config)
    if path.is_file() and changed_options(yaml.safe_load(path.read_text(encoding="utf-8")), config):
        shutil.copyfile(path, folder / f"config.before-{step:08d}.yaml")
    write_file(path, yaml.safe_dump(config, sort_keys=False))


def _changes(folder: Path, config: dict[str, Any], progress: Progress | None, num_processes: int) -> list[str]:
    """How this run differs from the one in the folder; nothing where there is none."""
    if not (folder / CONFIG).is_file():
        return []
    begun: dict[str, Any] = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    changes = changed_options(begun, config)
    if progress is not None and progress.places and len(progress.places) != num_processes:
        changes.append(f"processes: {len(progress.places)} -> {num_processes}")
    return changes


def _finished(folder: Path) -> dict[str, Any] | None:
    """The metrics of a run that came to its end; None for any other."""
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        return metrics if isinstance(metrics["training"]["steps"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _locked(folder: Path, locks: list[FolderLock]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    lock.acquire()
    locks.append(lock)


def move_aside(folder: Path) -> Path | None:
    """Rename the folder of a run to the first free `NAME.1`, `NAME.2`, ...; None if there is nothing in it.

    Raises:
        ValueError: it holds something else, see `check_run_folder`.
    """
    check_run_folder(folder)
    if not _content(folder):
        return None
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} holds an earlier run and is the folder you are in; choose another train.output_dir")
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def check_run_folder(folder: Path) -> None:
    """Only the folder of a run, an empty one, or none at all may become a run's: nothing else is moved or written to.

    Raises:
        ValueError: a file, or a folder that holds something but no run's `config.yaml`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"train.output_dir {folder} is not a folder")
    content = _content(folder)
    if content and not _is_run(folder):
        raise ValueError(
            f"train.output_dir {folder} holds {content[0]}{', ...' if len(content) > 1 else ''} and no {CONFIG} of a "
            "run; choose an empty or a new folder"
        )


def _content(folder: Path) -> list[str]:
    """What a run killed before its `config.yaml` was written leaves behind does not count."""
    own = (LOCK, CONFIG + PARTIAL)
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in own) if folder.exists() else []


def _is_run(folder: Path) -> bool:
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    # Other programs have a file of this name too; what a run writes beside it is its history.
    return isinstance(config, dict) and ("train" in config or (folder / HISTORY).is_file())

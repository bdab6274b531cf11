"""The folder of a run: locked while the run is active; an earlier run in it is renamed, not overwritten."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from loopitr.data.description import DescribedData
from loopitr.distributed import first_rank
from loopitr.durable import PARTIAL, write_file
from loopitr.lineage import DESCRIPTION, stamp, start_mark
from loopitr.reading import read_json, read_yaml
from loopitr.training.checkpoints import CONFIG, Checkpoint, newest_checkpoint
from loopitr.training.folder_lock import LOCK, FolderLock
from loopitr.training.reporting import HISTORY, METRICS
from loopitr.training.resume_check import changed_options, stored_config

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Entered:
    """The result of entering a run folder.

    Attributes:
        finished: the metrics of a finished run that is resumed and has nothing left to do, or None.
        checkpoint: the checkpoint to continue from, or None.
        lines: lines for the log.
    """

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
    data: DescribedData,
    resume: bool,
    with_changes: bool = False,
) -> Iterator[Entered]:
    """A context in which this run has `folder` to itself; only the lock is written there.

    An earlier run in the folder is renamed, unless it is resumed and has a checkpoint.

    Args:
        config: the options of this run. Those of a resumed run must be the same, except for some that do not affect
            training (`resume_check.py`).
        total_steps: the number of steps of this run; a resumed run that has made them has nothing left to do.
        data: the records of this run; those of a resumed run must be the same.
        with_changes: accept changed options.

    Raises:
        ValueError: the folder holds something other than a run, or another run is active in it; or the run cannot be
            resumed because its options differ, its checkpoints are damaged, or it is finished and has no checkpoint.
        OSError: the folder cannot be made or written to.
    """
    accelerator.wait_for_everyone()  # Other ranks may still be reading `model.init` in this folder.
    locks: list[FolderLock] = []
    try:
        request = _Request(
            resume, with_changes, total_steps, accelerator.num_processes, str(accelerator.mixed_precision), data
        )
        entered = first_rank(partial(_enter, folder, stored_config(config), locks, request))
        for line in entered.lines:
            accelerator.print(line)
        yield entered
    finally:
        for lock in locks:
            lock.release()


@dataclass(frozen=True)
class _Request:
    resume: bool
    with_changes: bool
    total_steps: int
    num_processes: int
    precision: str
    data: DescribedData


def _enter(folder: Path, config: dict[str, Any], locks: list[FolderLock], request: _Request) -> Entered:
    check_run_folder(folder)  # This must come before the lock is written there.
    _lock(folder, locks)
    if init := config.get("model", {}).get("init"):  # It may be in this folder, and is then moved aside.
        request.data.start = stamp(init)
    lines: list[str] = []
    total_steps = request.total_steps
    newest = newest_checkpoint(folder / CHECKPOINTS, log=lines.append) if request.resume else None
    progress = newest.progress if newest else None
    if request.resume:
        changes = _changes(folder, config, newest, request)
        if changes and not request.with_changes:
            raise ValueError(
                f"{folder} was started with other options ({'; '.join(changes)}); resume it with its own, or accept "
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
        # A run that was killed before its first checkpoint is renamed too, since it may have saved a validated model.
        aside = move_aside(folder)
        if aside is not None:
            _lock(folder, locks)
            (aside / LOCK).unlink(missing_ok=True)
            cut_short = not request.resume and _finished(aside) is None and any((aside / CHECKPOINTS).glob("*"))
            hint = f"; to go on with it: --train.output_dir {aside} --resume" if cut_short else ""
            lines.append(f"moved the earlier run in {folder} to {aside}{hint}")
    return Entered(checkpoint=newest.path if newest else None, lines=tuple(lines))


def store_config(folder: Path, config: dict[str, Any], data: DescribedData, *, step: int) -> None:
    """Write `config.yaml` and `data.json` at the start or when the run is resumed after `step` steps.

    If options or data have changed, the earlier files are kept as `config.before-STEP.yaml` and
    `data.before-STEP.json`, since evaluations look up the data that a run was trained on.
    """
    path, description, config = folder / CONFIG, folder / DESCRIPTION, stored_config(config)
    if path.is_file() and (changed_options(read_yaml(path), config) or data.changes_since(description)):
        for file in (path, description):
            if file.is_file():
                before = file.with_name(f"{file.stem}.before-{step:08d}{file.suffix}")
                write_file(before, file.read_text(encoding="utf-8"))
    content = data.content | ({"start": start} if step and (start := start_mark(folder)) else {})
    write_file(path, yaml.safe_dump(config, sort_keys=False))
    write_file(description, json.dumps(content, indent=1) + "\n")


def _changes(folder: Path, config: dict[str, Any], newest: Checkpoint | None, request: _Request) -> list[str]:
    """The differences between this run and the one in the folder, or that of its checkpoint; empty if there is none."""
    if not (folder / CONFIG).is_file():
        return []
    changes = changed_options(read_yaml(folder / CONFIG), config)
    if newest is not None and (newest.path / CONFIG).is_file():
        own = _options(newest.path / CONFIG)
        earlier = (_options(path) for path in folder.glob("config.before-*.yaml"))
        if all(changed_options(options, own) for options in earlier):  # It may be from before accepted changes.
            more = (f"{change} (of {newest.path.name})" for change in changed_options(own, config))
            changes += [change for change in more if change.rpartition(" (")[0] not in changes]
    # Changed options of the data explain other records.
    if not any(change.startswith("data.") for change in changes):
        changes += request.data.changes_since(folder / DESCRIPTION)
    places = newest.progress.places if newest else []
    if places and len(places) != request.num_processes:
        changes.append(f"processes: {len(places)} -> {request.num_processes}")
    precision = newest.progress.precision if newest else ""
    if precision not in ("", request.precision) and not any(c.startswith("train.precision") for c in changes):
        changes.append(f"mixed precision: {precision} -> {request.precision}")
    return changes


def _options(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    return content if isinstance(content, dict) else {}


def _finished(folder: Path) -> dict[str, Any] | None:
    """The metrics of a finished run; None: the run in the folder is not finished."""
    try:
        metrics = read_json(folder / METRICS)
        return metrics if isinstance(metrics["training"]["steps"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock(folder: Path, locks: list[FolderLock]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    lock.acquire()
    locks.append(lock)


def move_aside(folder: Path) -> Path | None:
    """Rename a run folder to the first free `NAME.1`, `NAME.2`, ...; returns its new path, or None if it is empty.

    Raises:
        ValueError: it is not a run folder (`check_run_folder`), or it is the current folder.
    """
    check_run_folder(folder)
    if not _content(folder):
        return None
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder} holds an earlier run and is the folder you are in; choose another train.output_dir")
    number = 1
    while os.path.lexists(folder.with_name(f"{folder.name}.{number}")):  # A dangling link is in the way too.
        number += 1
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def check_run_folder(folder: Path) -> None:
    """Check that a run may use `folder`: it does not exist, is empty, or holds an earlier run.

    Raises:
        ValueError: it is a file, or a folder that holds something other than a run.
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
    """The names in a folder, except for files that a run leaves that is killed before it has written `config.yaml`."""
    own = (LOCK, CONFIG + PARTIAL)
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in own) if folder.exists() else []


def _is_run(folder: Path) -> bool:
    try:
        config = read_yaml(folder / CONFIG)
    except (OSError, ValueError):
        return False
    # Other programs have a config.yaml too, even one with a part `train`; that of a run names its folder, or has a
    # history next to it.
    if not isinstance(config, dict):
        return False
    train = config.get("train")
    return (isinstance(train, dict) and "output_dir" in train) or (folder / HISTORY).is_file()

"""The folder of a run: nobody else's while the run is at work, and an earlier run in it is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from loopitr.distributed import first_rank
from loopitr.training.folder_lock import LOCK, FolderLock

CONFIG = "config.yaml"


@contextlib.contextmanager
def run_folder(folder: Path, config: dict[str, Any], accelerator: Accelerator, *, resume: bool) -> Iterator[None]:
    """Within it, `folder` is this run's alone and has its `config.yaml`; an earlier run is moved aside unless resumed.

    Raises:
        ValueError: another run is at work in the folder.
        OSError: the folder cannot be made or written to.
    """
    accelerator.wait_for_everyone()  # to have read model.init, which may lie there
    locks: list[FolderLock] = []
    try:
        aside = first_rank(partial(_enter, folder, config, locks, resume=resume))
        if aside is not None:
            accelerator.print(f"moved the earlier run in {folder} to {aside}")
        yield
    finally:
        for lock in locks:
            lock.release()


def _enter(folder: Path, config: dict[str, Any], locks: list[FolderLock], *, resume: bool) -> Path | None:
    _locked(folder, locks)
    aside = None if resume else move_aside(folder)
    if aside is not None:
        _locked(folder, locks)
        (aside / LOCK).unlink(missing_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    return aside


def _locked(folder: Path, locks: list[FolderLock]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    lock.acquire()
    locks.append(lock)


def move_aside(folder: Path) -> Path | None:
    """Rename a folder that holds something to the first free `NAME.1`, `NAME.2`, ...; None if there was nothing."""
    if not folder.exists() or all(entry.name == LOCK for entry in folder.iterdir()):
        return None
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))

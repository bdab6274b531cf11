"""One run at a time in a folder: a lock file that names the process that holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

import psutil

LOCK = "run.lock"
_HELD: set[Path] = set()  # what this process itself has locked
PRECISION = 2.0  # seconds; a process's start is not known more exactly on every system


class FolderLock:
    """The lock of a run folder, from `acquire` to `release`.

    The file holds the pid, the host and the start of the process that made it. A process that is gone, or another one
    that has the same pid by now, holds no lock; what runs on another host cannot be seen, and is believed to run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._held = False

    def acquire(self) -> None:
        """
        Raises:
            ValueError: another process has the lock.
            OSError: the file cannot be written.
        """
        with _opened(self.path) as file:
            holder = _holder(file)
            if holder is not None and _runs(holder, self.path):
                raise ValueError(_refusal(self.path, holder))
            file.seek(0)
            file.truncate()
            json.dump(_this_process(), file)
            file.flush()
            self._held = True
            _HELD.add(self.path.resolve())  # before the file is another thread's to read

    def release(self) -> None:
        """Delete the file; nothing happens where this lock was not acquired, or is another process's by now."""
        if not self._held:
            return
        self._held = False
        _HELD.discard(self.path.resolve())
        with contextlib.suppress(OSError, ValueError):  # The folder may be gone.
            if json.loads(self.path.read_text()) == _this_process():
                self.path.unlink()


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    """The lock file, read and written by one process at a time: of two that start together, one sees the other."""
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            _wait_for(file)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    yield file
                    return
        # Meanwhile its holder deleted it, or moved its folder aside.


def _wait_for(file: IO[str]) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Neither Windows nor every network file system has it.
        pass


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}


def _holder(file: IO[str]) -> dict[str, Any] | None:
    file.seek(0)
    try:
        holder = json.load(file)
        return {"pid": int(holder["pid"]), "host": str(holder["host"]), "started": float(holder["started"])}
    except (ValueError, KeyError, TypeError):  # A process died before it had written it.
        return None


def _runs(holder: dict[str, Any], path: Path) -> bool:
    if holder["host"] != socket.gethostname():
        return True
    if holder["pid"] == os.getpid():
        return path.resolve() in _HELD
    try:
        process = psutil.Process(holder["pid"])
        started = abs(process.create_time() - holder["started"]) < PRECISION
        return started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    text = f"another run is at work in {path.parent}: process {holder['pid']} on {holder['host']}"
    if holder["host"] == socket.gethostname():
        return f"{text}; choose another train.output_dir"
    return f"{text}; if that one is gone, delete {path}, else choose another train.output_dir"

"""A lock file for run folders, which names the process that holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

import psutil

LOCK = "run.lock"
_HELD: set[Path] = set()  # the locks that this process holds
PRECISION = 2.0  # seconds; some systems do not know a process's start more exactly


class FolderLock:
    """The lock of a run folder, from `acquire` to `release`.

    The file has the pid, host and start of its process. The lock of a process that no longer runs is ignored, even
    if its pid has been given to another process. A process on another host is assumed to be running.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._held = False

    def acquire(self) -> None:
        """Take the lock.

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
            _HELD.add(self.path.resolve())  # This comes before another thread can read the file.

    def release(self) -> None:
        """Delete the file, if this process has acquired the lock and still holds it."""
        if not self._held:
            return
        self._held = False
        _HELD.discard(self.path.resolve())
        with contextlib.suppress(OSError, ValueError):  # The folder may be gone.
            if json.loads(self.path.read_text()) == _this_process():
                self.path.unlink()


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    """The lock file, opened by only one process at a time, so that two that start together see each other."""
    # What a link leads to would be written over, and a pipe would be waited for.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(f"{path} is a link and no lock file, or no file at all: delete it")
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            _wait_for(file)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    yield file
                    return
        # The file was deleted, or its folder renamed, while this process waited; try again with a new file.


def _wait_for(file: IO[str]) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Windows and some network file systems do not have it.
        pass


def _this_process() -> dict[str, Any]:
    pid, started = os.getpid(), psutil.Process().create_time()
    return {"pid": pid, "host": socket.gethostname(), "started": started, "birth": _birth(pid)}


def _birth(pid: int) -> str | None:
    """When a process started, in ticks since a boot of the system; None: the system does not say.

    Its time of day, as a later process reads it, changes when the clock is set.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None


def _holder(file: IO[str]) -> dict[str, Any] | None:
    file.seek(0)
    try:
        holder = json.load(file)
        pid, host, started = int(holder["pid"]), str(holder["host"]), float(holder["started"])
        known = {"pid": pid, "host": host, "started": started, "birth": holder.get("birth")}
        return known if pid > 0 and host.isprintable() else None
    except (
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
    ):
        return None  # Its process died before it had written the file.


def _runs(holder: dict[str, Any], path: Path) -> bool:
    if holder["host"] != socket.gethostname():
        return True
    if holder["pid"] == os.getpid():
        return path.resolve() in _HELD
    try:
        process = psutil.Process(holder["pid"])
        birth = _birth(holder["pid"])
        if holder["birth"] is not None and birth is not None:
            started = holder["birth"] == birth
        else:
            started = abs(process.create_time() - holder["started"]) < PRECISION
        return started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    text = f"another run is active in {path.parent}: process {holder['pid']} on {holder['host']}"
    if holder["host"] == socket.gethostname():
        return f"{text}; choose another train.output_dir"
    return f"{text}; if that one has ended, delete {path}, else choose another train.output_dir"

"""Executes the runs of a grid in processes, one after the other; each has its own log, and one may fail alone."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from loopitr.training.grid import GridRun

try:
    import fcntl
except ImportError:  # On Windows, nothing prevents two processes from executing the same run.
    fcntl = None  # type: ignore[assignment]

START, END = "== started: ", "== exit status "
PATIENCE = 10  # seconds that a terminated process has before it is killed


def execute(run: GridRun, command: Sequence[str], *, resume: bool) -> int:
    """Run `command --config=CONFIG [--resume]` to its end and return its exit status; its output goes to the run's log.

    If this process is interrupted, the run is terminated too.

    Raises:
        ValueError: another process is executing this run.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    words = [*command, f"--config={run.config}", *(["--resume"] if resume else [])]
    with run.log.open("a", encoding="utf-8") as log:
        # The run inherits the file and so the lock, which lasts even if this process is killed and the run is not.
        _lock(log.fileno(), run)
        if not resume:
            log.truncate(0)
        run.config.write_text(yaml.safe_dump(dataclasses.asdict(run.options), sort_keys=False))
        log.write(f"{START}{shlex.join(words)}\n")
        log.flush()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait()
        except BaseException:
            _end(process.pid)
            raise
        log.write(f"\n{END}{status}\n")
    return status


def stop_when_terminated() -> None:
    """Make SIGTERM end this process like Ctrl-C, so that the run that it waits for is terminated too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def failure(run: GridRun) -> str | None:
    """Why the latest attempt at a run without metrics failed, in one line; None: the attempt was interrupted."""
    if run.metrics() is not None or not run.log.is_file():
        return None
    lines = [line.strip() for line in _lines(run.log)]
    ends = [line for line in lines[-1:] if line.startswith(END)]
    if not ends:
        return None
    status = int(ends[0].removeprefix(END))
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    start = max((i for i, line in enumerate(lines) if line.startswith(START)), default=0)
    output = [line for line in lines[start + 1 : -1] if line]
    errors = [line.removeprefix("error: ") for line in output if line.startswith("error: ")]
    return (errors or output or [f"exit status {status}"])[-1]


def attempts(run: GridRun) -> int:
    """How often the run was started or resumed, since it last began from scratch."""
    return sum(line.startswith(START) for line in _lines(run.log)) if run.log.is_file() else 0


def _lines(path: Path) -> list[str]:
    """The lines of a log; each state of a progress bar counts as a line."""
    return path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()


def _lock(file: int, run: GridRun) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"row {run.row!r}: another process uses {run.folder}; wait for it or end it") from error


def _end(pid: int) -> None:
    """End a process and its descendants."""
    try:
        parent = psutil.Process(pid)
        processes = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()

"""Training runs in processes that a test can kill: forked, so that each starts without importing torch again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.tiny_run import make_trainer, reset_accelerate, tiny_options

from loopitr.cli import run as run_command


def fork(work: Callable[[], object], log: Path) -> int:
    """Start `work` in a process of its own, as a recipe does; returns its pid. What it prints goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        torch.set_num_threads(1)
        run_command(lambda: work() and None)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def start(folder: Path, log: Path, *, prepare: Callable[[], object] = lambda: None, **changes: Any) -> int:
    """Fork a tiny run (`helpers.tiny_run`); `prepare` is called in the new process first."""
    folder.mkdir(exist_ok=True)
    options = tiny_options(folder, **changes)

    def work() -> None:
        reset_accelerate()
        prepare()
        make_trainer(options).run()

    return fork(work, log)


def wait(pid: int, seconds: float = 120) -> int:
    """The exit status, negative for a signal that killed it; a process that takes longer is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} took over {seconds} s")


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.005)


def steps_logged(folder: Path) -> int:
    """The last step in the history of a run that may be at work."""
    try:
        lines = (folder / "run" / "history.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0

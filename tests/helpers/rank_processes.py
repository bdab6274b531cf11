"""Real processes (gloo), two unless more are asked for, that a test file starts of itself.

They are forked, so that none of them imports torch again, and run the file as `python FILE RANK FOLDER` would; it is to
call `join`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import fork
from helpers.tiny_run import reset_accelerate
from helpers.waiting import wait_for_all

RANKS = 2
VARIABLE = "LOOPITR_TEST_RANKS"  # how many of them there are
TIMEOUT = 300  # After so many seconds a hang is a failure.


def join(index: int, folder: Path) -> None:
    """Be rank `index`; the ranks meet in `folder`."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    limit = timedelta(seconds=120)
    ranks = int(os.environ[VARIABLE])
    dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=ranks, timeout=limit)


def leave(index: int, folder: Path, results: dict[str, Any]) -> None:
    """Hand `results` over to the test."""
    torch.save(results, folder / f"rank{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start_ranks(file: str, folder: Path, *, ranks: int = RANKS) -> list[dict[str, Any]]:
    """What each rank of `file` handed over."""

    def work(index: int) -> None:
        reset_accelerate()
        os.environ.update({VARIABLE: str(ranks), "LOOPITR_DEBUG": "1"})  # An error comes with its traceback.
        sys.argv = [file, str(index), str(folder)]
        runpy.run_path(file, run_name="__main__")

    pids = [fork(partial(work, index), folder / f"log{index}") for index in range(ranks)]
    try:
        codes = wait_for_all(pids, TIMEOUT)
    except TimeoutError:
        codes = [-signal.SIGKILL]
    if any(codes):
        text = "\n".join((folder / f"log{index}").read_text()[-3000:] for index in range(ranks))
        pytest.fail(f"exit codes {codes} ({-signal.SIGKILL}: hung for {TIMEOUT} s)\n{text}")
    return [torch.load(folder / f"rank{index}.pt", weights_only=True) for index in range(ranks)]

"""Real processes (gloo), two unless more are asked for, that a test file starts of itself.

`python FILE RANK FOLDER` is to call `join`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

RANKS = 2
VARIABLE = "LOOPITR_TEST_RANKS"  # how many of them there are
TIMEOUT = 150  # After so many seconds a hang is a failure.


def join(index: int, folder: Path) -> None:
    """Be rank `index`; the ranks meet in `folder`."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    limit = timedelta(seconds=60)
    ranks = int(os.environ[VARIABLE])
    dist.init_process_group("gloo", init_method=meeting, rank=index, world_size=ranks, timeout=limit)


def leave(index: int, folder: Path, results: dict[str, Any]) -> None:
    """Hand `results` over to the test."""
    torch.save(results, folder / f"rank{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start_ranks(file: str, folder: Path, *, ranks: int = RANKS) -> list[dict[str, Any]]:
    """What each rank of `file` handed over."""
    search_path = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", VARIABLE: str(ranks)}
    processes = []
    for index in range(ranks):
        arguments = [sys.executable, file, str(index), str(folder)]
        with (folder / f"log{index}").open("w") as log:  # The process keeps a handle of its own.
            processes.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=log))
    codes: list[int | None] = [None]
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes) or None in codes:
        text = "\n".join((folder / f"log{index}").read_text()[-3000:] for index in range(ranks))
        pytest.fail(f"exit codes {codes} (None: hung for {TIMEOUT} s)\n{text}")
    return [torch.load(folder / f"rank{index}.pt", weights_only=True) for index in range(ranks)]

"""`accelerate launch --cpu --num_processes N` on one machine.

accelerate leaves CPU processes to MPI: without a hostfile it starts one process and says nothing (its issue 2741). The
recipes notice, and start the N processes with torch's launcher.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LAUNCHERS = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_all_processes() -> bool:
    """Start the processes that accelerate was asked for if it started this one alone, wait for them, return whether.

    Exits with the status of a process that failed.
    """
    import psutil

    parent = psutil.Process().parent()
    count = missing_processes(os.environ, parent.cmdline() if parent is not None else [])
    if count < 2:
        return False
    from accelerate.utils.other import get_free_port
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    port = int(os.environ.get("MASTER_PORT", 0)) or get_free_port()
    meeting = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    try:
        torchrun([f"--nproc-per-node={count}", *meeting, sys.argv[0], *sys.argv[1:]])
    except ChildFailedError as error:  # has said why
        sys.exit(max(1, *(failure.exitcode for failure in error.failures.values())))
    return True


def missing_processes(environment: Mapping[str, str], parent: Sequence[str]) -> int:
    """How many CPU processes the parent's command line asks for, where `environment` shows that this is the only one;
    else 1."""
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    # With more than one process accelerate sets the address where they are to meet.
    if not on_cpu or "MASTER_ADDR" not in environment or any(name in environment for name in WORLD_SIZES):
        return 1
    start = next((i for i, word in enumerate(parent) if Path(word).name in LAUNCHERS), None)
    if start is None:
        return 1
    from accelerate.commands.launch import launch_command_parser

    asked = launch_command_parser().parse_args(list(parent[start + 1 :]))
    return asked.num_processes if (asked.num_machines or 1) == 1 and asked.num_processes else 1

"""`accelerate launch` on the CPUs of one machine.

accelerate starts several CPU processes only with MPI and a hostfile. Otherwise it starts one process, whatever
`--num_processes` says (its issue 2741), with one thread unless more are asked for. The recipes detect this, start the
N processes with torch's launcher, and divide the cores among them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

LAUNCHERS = ("launch", "launch.py", "accelerate-launch", "accelerate.commands.launch")
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SAVE_SECONDS = 50  # the time that processes have to save after a signal to stop, or after one of them has died


def start_all_processes() -> bool:
    """If accelerate was asked for several CPU processes and started only this one, start them and wait for them.

    A process that stays alone gets all cores, if accelerate limited its threads by default.

    Returns:
        Whether processes were started; this one then has nothing left to do.

    Raises:
        SystemExit: a process failed, or a signal stopped them; the code is that of the process or the signal. If the
            launcher ends, this also counts as a signal to stop.
    """
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    if _launches(words) is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    count = missing_processes(os.environ, words)
    if parent is not None and threads_by_default(os.environ, words, _environment(parent)):
        import torch  # This import is not at the top, since --help does not need it.

        threads = max(1, _cores() // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    if count < 2:
        return False
    from accelerate.utils.other import get_free_port
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    address = ["--master-addr=127.0.0.1", f"--master-port={asked_port(words) or get_free_port()}"]
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))
    try:
        torchrun([f"--nproc-per-node={count}", *address, sys.argv[0], *sys.argv[1:]])
    except ChildFailedError as error:  # The process that failed has printed the reason.
        sys.exit(max(1, *(failure.exitcode for failure in error.failures.values())))
    except SignalException as stop:  # The processes got the signal too, and have ended.
        sys.exit(128 + stop.sigval)
    return True


def end_with_parent() -> None:
    """Ask the system for a SIGTERM when the parent process ends (only on Linux).

    accelerate passes no signals to a single process that it started, which would then run on after a Ctrl-C. And ranks
    whose launcher is killed before they meet would wait for it for hours.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def missing_processes(environment: Mapping[str, str], parent: Sequence[str]) -> int:
    """The number of CPU processes that the parent's command line asks for, if this is the only one; else 1."""
    # These variables tell a process that accelerate started alone from one that has others.
    if not _on_cpu(environment) or "MASTER_ADDR" not in environment or any(name in environment for name in WORLD_SIZES):
        return 1
    asked = _asked(parent)
    return asked.num_processes if asked and (asked.num_machines or 1) == 1 and asked.num_processes else 1


def _on_cpu(environment: Mapping[str, str]) -> bool:
    return environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def asked_port(parent: Sequence[str]) -> int:
    """The port that the parent's command line asks for; 0: any.

    MASTER_PORT does not say this: it always has accelerate's default, on which two launches would collide.
    """
    asked = _asked(parent)
    return asked.main_process_port or 0 if asked else 0


def threads_by_default(
    environment: Mapping[str, str], parent: Sequence[str], parent_environment: Mapping[str, str]
) -> bool:
    """Whether accelerate, the parent, has limited this process to one thread without having been asked to."""
    if environment.get("OMP_NUM_THREADS") != "1" or "OMP_NUM_THREADS" in parent_environment:
        return False
    if any(name in environment for name in WORLD_SIZES):  # Other processes of this run share the cores.
        return False
    asked = _asked(parent)
    return asked is not None and asked.num_cpu_threads_per_process is None


def _cores() -> int:
    """The number of physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else sys.maxsize
    return min(psutil.cpu_count(logical=False) or 1, allowed)


def _environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # A process of another user; with this return value the threads stay as they are.
        return os.environ


def _launches(parent: Sequence[str]) -> int | None:
    """The position of accelerate's launcher in a command line; None: it is not there."""
    return next((i for i, word in enumerate(parent) if Path(word).name in LAUNCHERS), None)


def _asked(parent: Sequence[str]) -> argparse.Namespace | None:
    """The options that `accelerate launch` was given; None if the parent is something else."""
    start = _launches(parent)
    if start is None:
        return None
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_args(list(parent[start + 1 :]))

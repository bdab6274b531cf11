"""`accelerate launch` on the CPUs of one machine.

accelerate leaves CPU processes to MPI: without a hostfile it starts one process whatever `--num_processes` says (its
issue 2741), and gives it one thread unless asked for more. The recipes notice, start the N processes with torch's
launcher, and share the cores between them.
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
SAVE_SECONDS = 50  # that processes have to save in when they are told to stop, or when one of them has died


def start_all_processes() -> bool:
    """Start the processes that accelerate was asked for if it started this one alone, wait for them, return whether.

    A process that stays alone takes all cores if accelerate limited its threads by default.

    Exits with the status of a process that failed, or of a signal that stopped them. The launcher's end is a signal to
    stop, too.
    """
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    if _launches(words) is not None:
        end_with_parent()
        os.environ.update(fsdp_on_cpus(os.environ, words))
    count = missing_processes(os.environ, words)
    if parent is not None and threads_by_default(os.environ, words, _environment(parent)):
        import torch  # It is imported on use, since --help does without it.

        threads = max(1, _cores() // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    if count < 2:
        return False
    from accelerate.utils.other import get_free_port
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    meeting = ["--master-addr=127.0.0.1", f"--master-port={asked_port(words) or get_free_port()}"]
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))
    try:
        torchrun([f"--nproc-per-node={count}", *meeting, sys.argv[0], *sys.argv[1:]])
    except ChildFailedError as error:  # The process that failed has said why.
        sys.exit(max(1, *(failure.exitcode for failure in error.failures.values())))
    except SignalException as stop:  # It was passed on to them, and they have ended.
        sys.exit(128 + stop.sigval)
    return True


def end_with_parent() -> None:
    """Ask the system for a SIGTERM when the parent ends (Linux; elsewhere nothing happens).

    accelerate passes no signal on to a process that it started alone, which would go on with nobody to watch it.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def missing_processes(environment: Mapping[str, str], parent: Sequence[str]) -> int:
    """How many CPU processes the parent's command line asks for, where `environment` shows that this is the only one;
    else 1."""
    # With more than one process accelerate sets the address where they are to meet.
    if not _on_cpu(environment) or "MASTER_ADDR" not in environment or any(name in environment for name in WORLD_SIZES):
        return 1
    asked = _asked(parent)
    return asked.num_processes if asked and (asked.num_machines or 1) == 1 and asked.num_processes else 1


def fsdp_on_cpus(environment: Mapping[str, str], parent: Sequence[str]) -> dict[str, str]:
    """The variables of the FSDP that the parent's command line asks for; accelerate sets them for GPUs alone."""
    asked = _asked(parent) if _on_cpu(environment) else None
    if asked is None or not asked.use_fsdp:
        return {}
    named = {"AUTO_WRAP_POLICY": asked.fsdp_auto_wrap_policy, "VERSION": asked.fsdp_version}
    named["TRANSFORMER_CLS_TO_WRAP"] = asked.fsdp_transformer_layer_cls_to_wrap
    return {"ACCELERATE_USE_FSDP": "true"} | {f"FSDP_{name}": str(value) for name, value in named.items() if value}


def _on_cpu(environment: Mapping[str, str]) -> bool:
    return environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def asked_port(parent: Sequence[str]) -> int:
    """The port that the parent was asked to meet at; 0: any. (MASTER_PORT holds one in any case, accelerate's default,
    where two launches on a machine would meet each other.)"""
    asked = _asked(parent)
    return asked.main_process_port or 0 if asked else 0


def threads_by_default(
    environment: Mapping[str, str], parent: Sequence[str], parent_environment: Mapping[str, str]
) -> bool:
    """Whether accelerate, as the parent, set this process's only thread without having been asked to."""
    if environment.get("OMP_NUM_THREADS") != "1" or "OMP_NUM_THREADS" in parent_environment:
        return False
    if any(name in environment for name in WORLD_SIZES):  # Other processes of this run share the cores.
        return False
    asked = _asked(parent)
    return asked is not None and asked.num_cpu_threads_per_process is None


def _cores() -> int:
    """Physical ones, as far as this process may use them."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else sys.maxsize
    return min(psutil.cpu_count(logical=False) or 1, allowed)


def _environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        return process.environ()
    except psutil.Error:  # It is another user's: the threads stay as they are.
        return os.environ


def _launches(parent: Sequence[str]) -> int | None:
    """Where in a command line accelerate's launcher is named."""
    return next((i for i, word in enumerate(parent) if Path(word).name in LAUNCHERS), None)


def _asked(parent: Sequence[str]) -> argparse.Namespace | None:
    """The options that `accelerate launch` was given; None if the parent is something else."""
    start = _launches(parent)
    if start is None:
        return None
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_args(list(parent[start + 1 :]))

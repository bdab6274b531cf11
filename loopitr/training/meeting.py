"""The ranks of a run that no launcher watches meet here first, so that none waits for hours for one that has died.

torchrun and `accelerate launch` start the ranks and end them all when one dies. Where RANK, WORLD_SIZE and MASTER_ADDR
are set by hand or by a job's script, nobody does.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

SECONDS = 300
VARIABLE = "LOOPITR_MEETING_SECONDS"
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
PORT = 29500  # accelerate's default for CPUs, where MASTER_PORT may be left out
PAUSE = 0.1  # seconds between two looks at who has come
SHOWN = 8  # the number of missing ranks that an error names


def check_environment(environment: Mapping[str, str]) -> None:
    """Check the variables that say which rank this process is.

    A job of SLURM may have WORLD_SIZE without RANK, since each of its tasks may start a launcher.

    Raises:
        ValueError: one of them is not a number, or they contradict each other.
    """
    size, rank = _number(environment, "WORLD_SIZE"), _number(environment, "RANK")
    local, limit = _number(environment, "LOCAL_RANK"), _number(environment, "LOCAL_WORLD_SIZE")
    if local is not None and limit is not None and not -1 <= local < limit:
        raise ValueError(f"LOCAL_RANK is {local}, and LOCAL_WORLD_SIZE is {limit}: ranks count from 0")
    port = _number(environment, "MASTER_PORT")
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT must be from 1 to 65535, got {port}")
    if size is not None and size < 1:
        raise ValueError(f"WORLD_SIZE must be at least 1, got {size}")
    if rank is not None and size is None:
        raise ValueError(f"RANK is {rank}, and WORLD_SIZE, the number of ranks, is not set; set both or none")
    if rank is not None and size is not None and not 0 <= rank < size:
        raise ValueError(f"RANK is {rank}, and WORLD_SIZE is {size}: ranks count from 0")
    in_job = any(name.startswith("SLURM_") or name in RANKS for name in environment)
    if size is not None and size > 1 and not in_job:
        raise ValueError(f"WORLD_SIZE is {size}, and RANK, the number of this process, is not set; set both or none")


def check_size(environment: Mapping[str, str], processes: int) -> None:
    """Check that the run has as many processes as WORLD_SIZE says, if this process has a rank.

    Raises:
        ValueError: it has another number, so that every rank would train for itself.
    """
    size = _number(environment, "WORLD_SIZE")
    if "RANK" in environment and size is not None and size != processes:
        why = "LOCAL_RANK is not set" if "LOCAL_RANK" not in environment else "accelerate sees no GPU here"
        raise ValueError(
            f"WORLD_SIZE is {size}, and this rank would run alone: {why} (on CPUs, set ACCELERATE_USE_CPU=true too)"
        )


def meet(environment: Mapping[str, str]) -> Store | None:
    """Wait until all ranks have come, if no launcher watches them.

    They have five minutes by default, since ranks on a busy file system may import torch minutes apart; the environment
    variable LOOPITR_MEETING_SECONDS changes that.

    Returns:
        What the ranks met in, which has to be kept until their process group has been made; None: there was no need.

    Raises:
        ValueError: some of the ranks have not come, two have the same number, they disagree on their number, or rank 0
            has ended or cannot be reached.
    """
    check_environment(environment)
    size, rank, host = _number(environment, "WORLD_SIZE"), _number(environment, "RANK"), environment.get("MASTER_ADDR")
    if size is None or rank is None or size < 2 or not host or "TORCHELASTIC_RUN_ID" in environment:
        return None
    from torch import distributed

    if distributed.is_initialized():
        return None
    port, asked = _number(environment, "MASTER_PORT") or PORT, _number(environment, VARIABLE)
    seconds = SECONDS if asked is None else max(1, asked)
    end = time.monotonic() + seconds
    if rank > 0:
        _knock(rank, host, port, end, seconds)
    try:
        store = distributed.TCPStore(
            host,
            port,
            is_master=rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,  # The process group makes another store, at the same port.
        )
        return _wait(store, rank, size, end, seconds)
    except RuntimeError as error:  # The errors of torch's network are of this type, and of several lines.
        reason = str(error).splitlines()[0]
        if rank == 0:
            raise ValueError(f"rank 0 cannot listen at MASTER_PORT {port}: {reason}") from error
        raise ValueError(f"rank {rank}: rank 0 at {host}:{port} has ended before all ranks came: {reason}") from error


def _knock(rank: int, host: str, port: int, end: float, seconds: float) -> None:
    """Wait until rank 0 listens; torch would do so too, and print all that it tries."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(end - time.monotonic(), PAUSE)).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"rank {rank} cannot reach rank 0 at {host}:{port} within {seconds} s ({error}): it has ended, "
                    f"or MASTER_ADDR or MASTER_PORT is wrong; {VARIABLE} gives slow starts more time"
                ) from error
        time.sleep(PAUSE)


def _wait(store: Store, rank: int, size: int, end: float, seconds: float) -> Store:
    others = store.compare_set("loopitr/size", "", str(size)).decode()
    if others != str(size):
        raise ValueError(f"WORLD_SIZE is {size} here, and {others} for another rank")
    if store.add(f"loopitr/rank{rank}", 1) > 1:
        raise ValueError(f"RANK {rank} is taken by another process of this run, or MASTER_PORT by another run")
    came = store.add("loopitr/came", 1)
    while came < size:
        if time.monotonic() > end:
            missing = [other for other in range(size) if not store.check([f"loopitr/rank{other}"])]
            names = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
            raise ValueError(
                f"{came} of {size} ranks came within {seconds} s, and rank {names} did not: see what they printed; "
                f"{VARIABLE} gives slow starts more time"
            )
        time.sleep(PAUSE)
        came = store.add("loopitr/came", 0)
    return store


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ValueError(f"the environment variable {name} must be an integer, got {value!r}") from None

"""Images opened and encoded in their order: on a CPU by several threads side by side, on a GPU one batch after another.

Two threads that encode with one core each do more than one that shares every layer out to two cores, and a core need
not wait while the next images are opened.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from loopitr.data.workers import leave_signals_to_the_run

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")

PIXELS = 8 * 224**2  # More at a time are no faster on a core, and take more memory.

_STARTING = threading.Lock()


@dataclass(frozen=True)
class Shares:
    """How batches of images are shared out: `encoders` threads take `size` images at a time, with `cores` each."""

    encoders: int
    size: int
    cores: int

    @classmethod
    def of(cls, count: int, batch_size: int, image_size: int, device: torch.device) -> Shares:
        """The shares of `count` images, of which at most `batch_size` are encoded at a time by all threads together."""
        at_a_time = max(1, min(count, batch_size))
        if device.type != "cpu":
            return cls(encoders=1, size=at_a_time, cores=1)
        cores = torch.get_num_threads()
        encoders = min(cores, at_a_time)
        size = min(-(-at_a_time // encoders), max(1, PIXELS // image_size**2))
        return cls(encoders=encoders, size=size, cores=cores // encoders)


def side_by_side(
    images: Dataset[Item],
    batches: Sequence[list[int]],
    collate: Callable[[list[Item]], Read],
    encode: Callable[[Read], Made],
    *,
    shares: Shares,
    num_workers: int = 0,
    open_in_threads: bool = False,
) -> Iterator[Made]:
    """`encode(collate(items))` of each batch of `images`, in order. Errors come where their batch would.

    Args:
        batches: indices of `shares.size` images each.
        encode: may be called by several threads at once, with the caller's inference mode, gradient mode and autocast.
        num_workers: processes that open images; 0: this one does.
        open_in_threads: with no processes, whether the threads that encode may open images too, several at once.
    """
    if shares.encoders > 1 and open_in_threads and not num_workers:
        return _in_threads(lambda batch: encode(collate([images[index] for index in batch])), batches, shares)
    # Its processes start here, before there are threads.
    reads = iter(
        DataLoader(
            images,
            batch_sampler=batches,
            num_workers=min(num_workers, len(batches)),
            collate_fn=collate,
            generator=torch.Generator(),  # The global generator, which dropout uses, stays where it is.
            worker_init_fn=leave_signals_to_the_run,
        )
    )
    return map(encode, reads) if shares.encoders == 1 else _in_threads(encode, reads, shares)


def _in_threads(call: Callable[[Any], Made], items: Iterable[Any], shares: Shares) -> Iterator[Made]:
    """`call` of each item, in order."""
    call = _as_here(call)
    coming: deque[Future[Made]] = deque()
    with _encoders(shares) as pool:
        try:
            for item in items:
                coming.append(pool.submit(call, item))
                if len(coming) == 2 * shares.encoders:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


@contextmanager
def _encoders(shares: Shares) -> Iterator[ThreadPoolExecutor]:
    """Threads that use `shares.cores` cores each."""
    with ThreadPoolExecutor(shares.encoders, "encoder") as pool:
        with _STARTING:  # What one thread sets is also what later threads start with, so it is set back at once.
            cores, ready = torch.get_num_threads(), threading.Barrier(shares.encoders)

            def start() -> None:
                torch.get_num_threads()  # When torch is first used in a thread, it gives it the process's number.
                torch.set_num_threads(shares.cores)
                ready.wait()  # so that every thread of the pool gets one of these calls

            try:
                for started in [pool.submit(start) for _ in range(shares.encoders)]:
                    started.result()
            except BaseException:  # such as no more threads for this process
                ready.abort()
                raise
            finally:
                torch.set_num_threads(cores)
        yield pool


def _as_here(call: Callable[[Any], Made]) -> Callable[[Any], Made]:
    """`call` for other threads, in this one's modes, which torch keeps for each thread."""
    inference, gradient = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    dtype, enabled = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    def called(read: Any) -> Made:
        autocast = torch.autocast("cpu", dtype=dtype, enabled=enabled)
        with torch.inference_mode(inference), torch.set_grad_enabled(gradient), autocast:
            return call(read)

    return called

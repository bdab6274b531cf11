"""What the caches of a data set share: whose they are, how images come in, a folder that is complete or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .decoded import DecodedImages, ToTensor
from .records import DataError, LazyRecords, Record, name_of


def names_digest(records: Sequence[Record]) -> str:
    """Digest of which images a sequence holds, in order, without reading any."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(getattr(records, "fingerprint", "").encode())
    for index in range(len(records)):
        digest.update(b"\0" + name_of(records, index).encode())
        if not isinstance(records, LazyRecords) and isinstance(records[index].image, (str, Path)):
            digest.update(b"\1" + str(records[index].image).encode())
    return digest.hexdigest()


def make_folder(folder: str | Path) -> None:
    """Have the folder that caches will lie in.

    Raises:
        DataError: it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot make a folder for the cache ({error.strerror})") from error


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Have `build(folder)` fill `target`, unless it is there already.

    The building happens in a folder of its own that is renamed when complete; a killed build leaves nothing that is
    taken for a cache, and of two concurrent builders the first to finish wins.

    Raises:
        DataError: no folder can be made there.
    """
    temporary = target.parent / f"{_prefix(target)}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    make_folder(target.parent)
    if target.exists():
        return
    try:
        _remove_abandoned(target)
        temporary.mkdir()
    except OSError as error:
        raise DataError(f"{target.parent}: cannot make a folder for the cache ({error.strerror})") from error
    try:
        build(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():  # else another process finished first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_space(folder: Path, size: int, what: str) -> None:
    """
    Raises:
        DataError: less than `size` bytes are free where `folder`, a cache being built, lies.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(f"{folder.parent}: {what} needs {size / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def read_images(
    records: Sequence[Record],
    transform: ToTensor,
    *,
    batch_size: int,
    num_workers: int,
    collate: Callable[[list[tuple[int, Tensor | str]]], Any] = list,
    shortest: int | None = None,
) -> DataLoader[Any]:
    """Batches of (index, `transform` of its image, or the reason why it is unreadable), in the records' order."""
    return DataLoader(
        DecodedImages(records, transform, shortest=shortest),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),  # the global one stays where it is: a run must not depend on a cold cache
    )


def _prefix(target: Path) -> str:
    return f".{target.name}.building-{socket.gethostname()}-"


def _remove_abandoned(target: Path) -> None:
    """Delete what killed builders on this host left behind; they may be gigabytes."""
    for folder in target.parent.glob(f"{_prefix(target)}*"):
        pid = int(folder.name[len(_prefix(target)) :].split("-")[0])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # alive, and someone else's

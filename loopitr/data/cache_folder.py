"""What the caches of a data set share: how they are named, built, described in `meta.json`, opened and checked.

A cache is a folder that is either complete or not there at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .decoded import DecodedImages, ToTensor
from .records import DataError, LazyRecords, Record, name_of
from .workers import leave_signals_to_the_run

META = "meta.json"


def names_digest(records: Sequence[Record]) -> str:
    """A digest of which images a sequence holds, in their order. No image is read for it."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(getattr(records, "fingerprint", "").encode())
    for index in range(len(records)):
        digest.update(b"\0" + name_of(records, index).encode(errors="surrogatepass"))
        if not isinstance(records, LazyRecords) and isinstance(records[index].image, (str, Path)):
            digest.update(b"\1" + str(records[index].image).encode(errors="surrogatepass"))
    return digest.hexdigest()


def make_folder(folder: str | Path) -> None:
    """Make the folder that caches will lie in, unless it exists.

    Raises:
        DataError: the folder cannot be made.
    """
    with _making(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)


@contextmanager
def _making(folder: str | Path) -> Iterator[None]:
    """Turns an operating system's error in the block into a `DataError` that names `folder`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder}: cannot make a folder for the cache ({error.strerror})") from error


def build_once(target: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    """Fill the folder `target` by `build(folder)`, unless it exists. What `build` returns becomes its `meta.json`.

    The building happens in a folder of its own that is renamed when it is complete. A killed build therefore leaves
    nothing that could pass for a cache, and of two concurrent builders the first to finish wins.

    Raises:
        DataError: no folder can be made there.
    """
    temporary = target.parent / f"{_prefix(target)}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    make_folder(target.parent)
    if target.exists():
        return
    with _making(target.parent):
        _remove_abandoned(target)
        temporary.mkdir()
    try:
        (temporary / META).write_text(json.dumps(build(temporary)))
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():  # Otherwise another process finished first, with the same content.
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_meta(folder: Path) -> dict[str, Any]:
    """What `build_once` wrote about a cache; callers read it, and its values, inside `expect_intact`."""
    return json.loads((folder / META).read_text())


@contextmanager
def expect_intact(folder: Path, problem: str) -> Iterator[None]:
    """Turns the errors of reading files that are missing or damaged into a `DataError` that says what to do."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{problem} ({error})") from error


def damaged(folder: Path, problem: str) -> DataError:
    """The error to raise for a cache whose files are not what a finished build leaves."""
    return DataError(f"{folder}: {problem}; delete it to have it built again")


def none_readable(records: Sequence[Record]) -> DataError:
    """The error to raise where not one image of `records` can be decoded, so that there is nothing to keep."""
    return DataError(f"none of {len(records)} images is readable, the first is {name_of(records, 0)}")


def check_space(folder: Path, size: int, what: str) -> None:
    """Check that `size` more bytes fit on the disk where `folder` lies, in which a cache is being built.

    Raises:
        DataError: fewer bytes are free.
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
    seed: int | None = None,
) -> DataLoader[Any]:
    """A loader of (index, `transform` of that record's image, or the reason why it is unreadable), in their order."""
    return DataLoader(
        DecodedImages(records, transform, shortest=shortest, seed=seed),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        # The global generator stays where it is, so that a run does not depend on whether its cache was built before.
        generator=torch.Generator(),
        worker_init_fn=leave_signals_to_the_run,
    )


def _prefix(target: Path) -> str:
    """How the names of the folders begin in which processes of this host build `target`."""
    return f".{target.name}.building-{socket.gethostname()}-"


def _remove_abandoned(target: Path) -> None:
    """Delete the folders that killed builders on this host left behind, since these may hold gigabytes."""
    for folder in target.parent.glob(f"{_prefix(target)}*"):
        pid = int(folder.name[len(_prefix(target)) :].split("-")[0])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # The process is alive and belongs to another user.


def check_key(key: str) -> None:
    """
    Raises:
        ValueError: what a caller gives as the digest of all that decides a cache's content is no digest.
    """
    if not re.fullmatch(r"[\w-]{8,}", key):
        raise ValueError(f"key must be a digest of at least 8 letters, digits, '-' or '_', got {key!r}")

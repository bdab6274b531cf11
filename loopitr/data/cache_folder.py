"""Common parts of the caches of a data set: naming, building, `meta.json`, opening and checking.

A cache is a folder that either is complete or does not exist.
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from loopitr.reading import read_object

from .decoded import DecodedImages, ToTensor
from .image_sizes import file_size, image_sizes
from .records import DataError, LazyRecords, Record, name_of
from .workers import leave_signals_to_the_run

META = "meta.json"


def images_digest(records: Sequence[Record]) -> str:
    """A digest of the names of a sequence's images, and of the sizes of their files or their pixels, in order.

    It reads no file of an image; the pixels are those of PIL images that are in memory.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(getattr(records, "fingerprint", "").encode())
    for index in range(len(records)):
        digest.update(b"\0" + name_of(records, index).encode(errors="surrogatepass"))
        image = None if isinstance(records, LazyRecords) else records[index].image
        if isinstance(image, Image.Image):
            digest.update(b"\3" + _pixels_digest(image))
        elif isinstance(image, (str, Path)):
            digest.update(b"\1" + str(image).encode(errors="surrogatepass"))
    sizes = image_sizes(records)
    if sizes is not None:
        digest.update(b"\2" + sizes.astype("<i8").tobytes())
    return digest.hexdigest()


def _pixels_digest(image: Image.Image) -> bytes:
    """A digest of a PIL image's pixels, or of the name and size of the file that it has not been read from yet."""
    digest = hashlib.blake2b(f"{image.mode} {image.size} ".encode(), digest_size=16)
    if getattr(image, "fp", None) is not None:  # Reading it now would keep every image in memory.
        name = str(getattr(image, "filename", ""))
        digest.update(f"{name} {file_size(name)}".encode(errors="surrogatepass"))
    else:
        with suppress(Exception):  # An image that was closed is reported when it is decoded.
            digest.update(image.tobytes())
    return digest.digest()


def stored_digest(meta: dict[str, Any]) -> str:
    """The digest of the images in a cache's `meta.json`; older caches have one of their names alone."""
    digest: str = meta["images_digest" if "images_digest" in meta else "names_digest"]
    return digest


def make_folder(folder: str | Path) -> None:
    """Make the folder that caches are written to, unless it exists.

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
    """Fill the folder `target` by `build(folder)`, unless it exists; the return value becomes its `meta.json`.

    `build` writes to a temporary folder, which is renamed when it is complete. So a killed build leaves nothing that
    looks like a cache, and if two processes build the same cache, the first to finish wins.

    Raises:
        DataError: the folder cannot be made.
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
    """The content of a cache's `meta.json`; callers read it and its values inside `expect_intact`."""
    return read_object(folder / META)


@contextmanager
def expect_intact(folder: Path, problem: str) -> Iterator[None]:
    """Turns errors from missing or damaged files in the block into a `DataError` that says what to do."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{problem} ({error})") from error


def damaged(folder: Path, problem: str) -> DataError:
    """The error for a cache with missing or damaged files."""
    return DataError(f"{folder}: {problem}; delete it to have it built again")


def none_readable(records: Sequence[Record]) -> DataError:
    """The error for records of which no image can be decoded, so that there is nothing to cache."""
    return DataError(f"none of {len(records)} images is readable, the first is {name_of(records, 0)}")


def check_space(folder: Path, size: int, what: str) -> None:
    """Check that the disk of `folder`, in which a cache is being built, has room for `size` more bytes.

    Raises:
        DataError: fewer bytes are free; the message says what needs them (`what`).
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
    """A loader of the items of `DecodedImages`, in order."""
    return DataLoader(
        DecodedImages(records, transform, shortest=shortest, seed=seed),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        # The global generator is not used, so that a run is the same whether it builds the cache or finds it.
        generator=torch.Generator(),
        worker_init_fn=leave_signals_to_the_run,
    )


def _prefix(target: Path) -> str:
    """The start of the names of temporary folders in which processes on this host build `target`."""
    return f".{target.name}.building-{socket.gethostname()}-"


def _remove_abandoned(target: Path) -> None:
    """Delete temporary folders of killed processes on this host, since these may hold gigabytes."""
    for folder in target.parent.glob(f"{_prefix(target)}*"):
        pid = int(folder.name[len(_prefix(target)) :].split("-")[0])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # The process is alive and belongs to another user.


def check_key(key: str) -> None:
    """Check the digest that identifies a cache's content.

    Raises:
        ValueError: it is too short, or has characters that do not belong in a file name.
    """
    if not re.fullmatch(r"[\w-]{8,}", key):
        raise ValueError(f"key must be a digest of at least 8 letters, digits, '-' or '_', got {key!r}")

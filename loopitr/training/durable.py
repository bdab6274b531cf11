"""Files that are whole or as they were: written aside, forced onto the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"
PARTIAL = ".partial"


def write_file(path: Path, text: str) -> None:
    """A reader, and whoever comes after a crash, sees the old text or the new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; the old file is as it was.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from loopitr.training.durable import write_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(Path(folder, "a.txt"), "whole")
        ...     print(Path(folder, "a.txt").read_text())
        whole
    """
    aside = path.with_name(path.name + PARTIAL)
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync(path.parent)


def write_files(folder: Path, write: Callable[[Path], None], *, seen: tuple[str, ...] = ()) -> None:
    """Let `write` fill an empty folder, then move each file into `folder`, where it replaces the one of its name.

    Args:
        seen: names of files in `folder` that `write` is to find, so that it can leave them as they are.

    Raises:
        OSError: writing failed; the files in `folder` are as they were.
    """
    aside = folder / f".saving{PARTIAL}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name in seen:
            if (folder / name).is_file():
                shutil.copy2(folder / name, aside / name)
        with as_os_error():
            write(aside)
            sync_all(aside)
        for path in sorted(aside.iterdir()):
            target = folder / path.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            path.replace(target)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """torch and safetensors say that a disk is full by errors of their own; here it is an `OSError`, whose cause they
    are."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        # torch's writer notices that something failed when it closes the file; what failed is the error before.
        first: BaseException | None = error
        while first is not None and not isinstance(first, OSError):
            first = first.__context__
        if first is not None:
            raise first from error
        if any(word in str(error) for word in ("PytorchStreamWriter", "iostream", "unexpected pos", "enforce fail")):
            raise OSError(str(error).splitlines()[0]) from error
        raise


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, onto the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # A folder cannot be opened everywhere.
        return
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot do it; those that can and fail are full or broken.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """`sync` every file in `folder`, then its folders."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: size and BLAKE2b digest of every file in `folder`."""
    files = {name: {"bytes": path.stat().st_size, "blake2b": digest(path)} for name, path in _files(folder).items()}
    write_file(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def fault(folder: Path) -> str | None:
    """What differs between a folder and its manifest, in words; None: nothing, or it has no manifest."""
    try:
        wanted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    try:
        found = _files(folder)
        for name, entry in wanted.items():
            if name not in found:
                return f"{name} is missing"
            size = found[name].stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes of {entry['bytes']}"
            if digest(found[name]) != entry["blake2b"]:
                return f"{name} has another content than was written"
        return None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"


def digest(path: Path) -> str:
    """BLAKE2b of a file, read in blocks."""
    hashed = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder and those below it by their relative names, the manifest left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder).as_posix()): path for path in paths if path.name != MANIFEST}

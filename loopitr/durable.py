"""Atomic writing of files: to a temporary name, synced to the disk, then renamed."""

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

from loopitr.reading import read_json

MANIFEST = "manifest.json"
PARTIAL = ".partial"


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old or the new content, also after a crash. Line ends stay.

    Raises:
        OSError: the disk is full, the folder cannot be written to, or the path is that of a device, such as /dev/null;
            the old file is unchanged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from loopitr.durable import write_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(Path(folder, "a.txt"), "whole")
        ...     print(Path(folder, "a.txt").read_text())
        whole
    """
    if path.is_char_device() or path.is_block_device():
        raise OSError(f"{path} is a device, and no file that can be replaced")
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)  # It may be a link to a file elsewhere.
        with partial.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.filename is None:  # That of a full disk has no name.
            error.filename = str(path)
        raise
    sync(path.parent)


def write_files(folder: Path, write: Callable[[Path], None], *, seen: tuple[str, ...] = ()) -> None:
    """Let `write` fill an empty temporary folder, then move its files to `folder`, replacing those of the same names.

    Args:
        seen: names of files in `folder` to copy to the temporary folder first, for `write` to decide on.

    Raises:
        OSError: writing failed; the files in `folder` are unchanged.
    """
    temporary = folder / f".saving{PARTIAL}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name in seen:
            if (folder / name).is_file():
                shutil.copy2(folder / name, temporary / name)
        with as_os_error():
            write(temporary)
            sync_all(temporary)
        for path in sorted(temporary.iterdir()):
            target = folder / path.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            path.replace(target)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """A context in which the errors that torch and safetensors raise on a full disk become an `OSError`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        # torch's writer raises a second error when it closes the file; the cause is the error before it.
        first: BaseException | None = error
        while first is not None and not isinstance(first, OSError):
            first = first.__context__
        if first is not None:
            raise first from error
        if any(word in str(error) for word in ("PytorchStreamWriter", "iostream", "unexpected pos", "enforce fail")):
            raise OSError(str(error).splitlines()[0]) from error
        raise


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's list of names, to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Some systems cannot open folders.
        return
    try:
        os.fsync(handle)
    except OSError as error:
        # These two mean that the file system does not support it; any other error means that it is full or broken.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """`sync` all files in `folder`, then its folders."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`, with size and BLAKE2b digest of every file in `folder`."""
    files = {name: {"bytes": path.stat().st_size, "blake2b": digest(path)} for name, path in _files(folder).items()}
    write_file(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def fault(folder: Path) -> str | None:
    """The first difference between a folder and its manifest, in words; None: no difference, or no manifest.

    A pipe or a device is a fault too, since reading it may never end.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file() and not path.is_dir():
            return f"{path.relative_to(folder)} is not a file"
    try:
        manifest = read_json(folder / MANIFEST)["files"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    try:
        files = _files(folder)
        for name, entry in manifest.items():
            if name not in files:
                return f"{name} is missing"
            size = files[name].stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes of {entry['bytes']}"
            if digest(files[name]) != entry["blake2b"]:
                return f"{name} has another content than was written"
        return None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"


def digest(path: Path) -> str:
    """The BLAKE2b digest of a file, read in blocks."""
    blake = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            blake.update(block)
    return blake.hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """The files in a folder and its subfolders by relative name, except for the manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder).as_posix()): path for path in paths if path.name != MANIFEST}

"""The `manifest.json` of an index, its lock for writing, and its list of skipped images."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from loopitr.building.keys import dual_key
from loopitr.durable import write_file
from loopitr.models.loop_model import LoopITRModel
from loopitr.reading import read_file, read_object, user_path

from .encoding import dual_of
from .retriever import Retriever

MANIFEST, LOCK, SKIPPED = "manifest.json", "index.lock", "skipped.csv"
FORMAT = 1
LARGEST = 2**31  # No width of a vector, or number of tokens, reaches it.
_HELD, _CHECKING = set[str](), threading.Lock()  # the indexes that this process is writing to
TOKEN_TYPES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of an index's `manifest.json`.

    Attributes:
        model, model_hash: the folder or hub id of the model, and a digest of everything that its embeds depend on.
        embed_dim: `E`.
        tokens, token_shape: the type of the stored image tokens (`fp16`, `bf16`) and their shape `[N, D]`, or None.
        store: the address of a Qdrant server, or a folder for its client's local mode; None: LanceDB in the index.
        collection: the name of the collection on the server.
        contents: where image tokens are stored; None: in the index.
        complete: False while the index is being built, or if that was interrupted.
        format: the version of the format.
    """

    model: str
    model_hash: str
    embed_dim: int
    tokens: str | None = None
    token_shape: tuple[int, int] | None = None
    store: str | None = None
    collection: str | None = None
    contents: str | None = None
    complete: bool = False
    format: int = FORMAT


def manifest_of(
    retriever: Retriever,
    model: str,
    *,
    tokens: str | None,
    store: str | None,
    collection: str | None,
    contents: str | None,
) -> Manifest:
    """The manifest of a new index."""
    vision = dual_of(retriever.model).vision
    tokens = tokens if isinstance(retriever.model, LoopITRModel) else None  # Only a fusion head reads tokens.
    return Manifest(
        model=model,
        model_hash=model_hash(retriever),
        embed_dim=dual_of(retriever.model).config.embed_dim,
        tokens=tokens,
        token_shape=(vision.num_tokens, vision.width) if tokens else None,
        store=store,
        collection=collection if store else None,
        contents=contents,
    )


def facts_of(manifest: Manifest) -> dict[str, str]:
    """What the tables of an index repeat of its manifest, because their columns alone would not contradict it."""
    shape = manifest.token_shape
    described = "none" if shape is None else f"{manifest.tokens} {shape[0]}x{shape[1]}"
    return {"model_hash": manifest.model_hash, "tokens": described}


def model_hash(retriever: Retriever) -> str:
    """A digest of the dual encoder, the same for a run and for the dual encoder exported from it."""
    return dual_key(dual_of(retriever.model), retriever.processor)


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of an index.

    Raises:
        FileNotFoundError: there is no such folder, or no index in it.
        ValueError: the manifest is damaged, or of another version of this package.
    """
    path = user_path(folder) / MANIFEST
    if not path.is_file():
        missing = "it is a file" if path.parent.exists() else "no such folder"
        reason = f"there is no {MANIFEST} in it" if path.parent.is_dir() else missing
        raise FileNotFoundError(f"{folder} is not a search index: {reason}; `loopitr search index` makes one")
    content = read_object(path)
    if content.get("format", FORMAT) != FORMAT:
        readable = f"this version of loopitr reads format {FORMAT}"
        raise ValueError(f"{path}: it has format {content['format']}, {readable}; index again into another folder")
    known = {field.name for field in fields(Manifest)}
    given = {name: value for name, value in content.items() if name in known}
    for name in ("model", "model_hash", "embed_dim", "format", *given):
        if name not in given or not _is_valid(name, given[name]):
            raise ValueError(f"{path} is damaged: {name} is {given.get(name, 'missing')!r}")
    manifest = Manifest(**given)
    if (manifest.tokens is None) != (manifest.token_shape is None):
        raise ValueError(f"{path} is damaged: tokens is {manifest.tokens!r}, token_shape {manifest.token_shape!r}")
    shape = manifest.token_shape
    return replace(manifest, token_shape=None if shape is None else (shape[0], shape[1]))


def _is_valid(name: str, value: Any) -> bool:
    if name == "tokens":
        return value is None or value in [*TOKEN_TYPES]
    if name == "token_shape":
        return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_size, value)))
    if name in ("embed_dim", "format"):
        return _is_size(value)
    if name == "complete":
        return isinstance(value, bool)
    optional = name in ("store", "collection", "contents")
    return (optional and value is None) or (isinstance(value, str) and value.isprintable() and value != "")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    write_file(folder / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def model_of(folder: str | Path, manifest: Manifest, device: str | torch.device | None) -> Retriever:
    """The model that an index was made with.

    Raises:
        OSError: it cannot be loaded, for example because it has been moved.
        ValueError: it is of another kind, or the device cannot be used.
    """
    try:
        return Retriever.from_pretrained(manifest.model, device=device)
    except OSError as error:
        moved = "if it has been moved, give its new place as the model (--model)"
        raise OSError(f"{folder}: the model of this index cannot be loaded ({error}); {moved}") from error


def check_model(folder: str | Path, manifest: Manifest, retriever: Retriever) -> None:
    """Check that a model is the one that an index was made with.

    Raises:
        ValueError: it is another one, or the manifest has sizes that are not the model's.
    """
    own = model_hash(retriever)
    if own != manifest.model_hash:
        raise ValueError(
            f"{folder} was indexed with another model ({manifest.model}, {manifest.model_hash[:12]}) than this one "
            f"({own[:12]}), so their vectors cannot be compared; give that model, or index again into another folder"
        )
    dual = dual_of(retriever.model)
    sizes = {"embed_dim": dual.config.embed_dim, "token_shape": (dual.vision.num_tokens, dual.vision.width)}
    for name, size in sizes.items():
        stored = getattr(manifest, name)
        if stored not in (size, None):
            raise ValueError(f"{folder}/{MANIFEST} is damaged: {name} is {stored}, and {size} in the model")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A context with the lock for writing to an index, which the system releases if the process is killed.

    Raises:
        ValueError: another process is writing to the index, or its lock is not a file.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    if lock.is_symlink() or (lock.exists() and not lock.is_file()):  # A pipe would never open.
        raise OSError(f"{lock} is not a lock file: delete it")
    taken = f"{folder} is being written to by another process; wait for it to end"
    key = str(folder.resolve())
    with _CHECKING:
        if key in _HELD:  # The lock of the system does not work within one process.
            raise ValueError(taken)
        _HELD.add(key)
    try:
        with open(lock, "a", encoding="utf-8") as file:
            try:
                import fcntl

                # Unlike `flock`, it is not inherited by worker processes, which may outlive a killed parent.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(taken) from error
            except (ImportError, OSError):  # Windows and some network file systems do not have it.
                pass
            yield
    finally:
        _HELD.discard(key)  # after closing the file, by which a process loses the lock on any other handle of it too


def read_skipped(folder: str | Path) -> dict[str, str]:
    """The skipped images: path -> reason.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / SKIPPED
    if not path.is_file():
        return {}
    try:
        header, *rows = csv.reader(io.StringIO(read_file(path), newline=""))
        if header != ["path", "reason"]:
            raise ValueError(f"its header is {header}")
        return {path: reason for path, reason in rows}  # noqa: C416 (a row of another length is an error)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error


def write_skipped(folder: Path, skipped: Mapping[str, str]) -> None:
    """Write the list of skipped images atomically."""
    table = io.StringIO()
    csv.writer(table).writerows([("path", "reason"), *skipped.items()])
    write_file(folder / SKIPPED, table.getvalue())

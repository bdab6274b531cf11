"""What an index says of itself: its `manifest.json`, the lock of those who write to it, the images it left out."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from loopitr.building.build import dual_key
from loopitr.models.loop_model import LoopITRModel

from .encoding import dual_of
from .retriever import Retriever

MANIFEST, LOCK, SKIPPED = "manifest.json", "index.lock", "skipped.csv"
FORMAT = 1
_HELD: set[str] = set()  # the indexes that this process writes to
TOKEN_TYPES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says of an index.

    model, model_hash: where the model came from, and the digest of all that its embeds depend on.
    embed_dim: `E`.
    tokens: the type of the image tokens that are kept (`fp16`, `bf16`), or None.
    token_shape: `[N, D]`, of the image tokens that are kept.
    store: the address of a Qdrant server, or a folder of its client's local mode; None: LanceDB in the index itself.
    collection: its name there.
    contents: where the image tokens lie; None: in the index itself.
    complete: False from the start of building until its end.
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
    """Of a new index."""
    vision = dual_of(retriever.model).vision
    kept = tokens if isinstance(retriever.model, LoopITRModel) else None  # Nothing else reads tokens.
    return Manifest(
        model=model,
        model_hash=model_hash(retriever),
        embed_dim=dual_of(retriever.model).config.embed_dim,
        tokens=kept,
        token_shape=(vision.num_tokens, vision.width) if kept else None,
        store=store,
        collection=collection if store else None,
        contents=contents,
    )


def model_hash(retriever: Retriever) -> str:
    """Of the dual encoder: of a run and of the dual encoder exported from it the same."""
    return dual_key(dual_of(retriever.model), retriever.processor)


def read_manifest(folder: str | Path) -> Manifest:
    """
    Raises:
        FileNotFoundError: no such folder, or no index in it.
        ValueError: a manifest that is damaged, or of another version of this package.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        what = f"there is no {MANIFEST} in it" if Path(folder).is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder} is no search index: {what}; `loopitr search index` makes one")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = int(content["format"])
        if found != FORMAT:
            known_format = f"this version of loopitr reads format {FORMAT}"
            raise ValueError(f"it has format {found}, {known_format}; index again into another folder")
        known = {field.name for field in fields(Manifest)}
        manifest = Manifest(**{name: value for name, value in content.items() if name in known})
        shape = manifest.token_shape
        return replace(manifest, token_shape=None if shape is None else (int(shape[0]), int(shape[1])))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete or not at all."""
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)


def check_model(folder: str | Path, manifest: Manifest, retriever: Retriever) -> None:
    """
    Raises:
        ValueError: the model is not the one that the index was made with.
    """
    own = model_hash(retriever)
    if own != manifest.model_hash:
        raise ValueError(
            f"{folder} was indexed with another model ({manifest.model}, {manifest.model_hash[:12]}) than this one "
            f"({own[:12]}): their vectors do not compare; give that model, or index again into another folder"
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within it, nobody else writes to the index; the system lets go of the lock of a process that is killed.

    Raises:
        ValueError: another process writes to it.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"{folder} is being written to by another process; wait for it to end"
    key = str(folder.resolve())
    if key in _HELD:  # A process is not kept out by its own lock.
        raise ValueError(taken)
    with open(folder / LOCK, "a", encoding="utf-8") as file:
        try:
            import fcntl

            # Other than those of `flock`, workers of a process that was killed do not hold this lock on.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(taken) from error
        except (ImportError, OSError):  # Neither Windows nor every network file system has it.
            pass
        _HELD.add(key)
        try:
            yield
        finally:
            _HELD.discard(key)


def read_skipped(folder: str | Path) -> dict[str, str]:
    """The images that were left out: path -> reason."""
    path = Path(folder) / SKIPPED
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def write_skipped(folder: Path, skipped: Mapping[str, str]) -> None:
    partial = folder / (SKIPPED + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "reason"), *skipped.items()])
    partial.replace(folder / SKIPPED)

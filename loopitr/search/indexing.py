"""Builds and updates an index: only new and changed images are encoded."""

from __future__ import annotations

from pathlib import Path

import torch

from loopitr.checks import check_known, check_whole
from loopitr.models.loop_model import LoopITRModel
from loopitr.reading import user_path

from .contents import Contents
from .manifest import (
    LOCK,
    MANIFEST,
    TOKEN_TYPES,
    Manifest,
    check_model,
    manifest_of,
    model_of,
    read_manifest,
    write_manifest,
    writing,
)
from .retriever import Retriever
from .sources import Source, check_images, open_source
from .stores import check_new
from .writer import IndexReport, Writer


def build_index(
    source: str | Path | Source,
    model: str | Path | Retriever,
    output: str | Path,
    *,
    images: str | Path | None = None,
    image_column: str = "image",
    tokens: str | None = None,
    store: str | None = None,
    collection: str | None = None,
    contents: str | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    show_progress: bool = True,
) -> IndexReport:
    """Index the images of a folder, a table or another source, or update an existing index.

    Files whose size and modification time have not changed are not opened again. So an interrupted call can simply be
    repeated, and a later call brings the index up to date. Unreadable images are skipped, reported, and listed in the
    index's `skipped.csv`.

    Args:
        source: a folder, which is searched with its subfolders; a CSV, TSV or JSON-lines file of image paths and other
            columns; or a `Source` (`loopitr/search/sources.py`).
        model: a run folder, an exported dual encoder, a hub id, or a loaded model.
        output: the folder of the index.
        images: the folder that relative paths of a table start from; None: the folder of the table.
        image_column: the column of a table that has the paths.
        tokens: the type in which image tokens are stored for reranking, `fp16` or `bf16`; `none`: images are opened
            again for it. None: fp16 in a new index.
        store: the address of a Qdrant server for the vectors, whose API key is in the environment variable
            QDRANT_API_KEY; None: LanceDB in the index.
        collection: the name of the collection on that server; None: that of the folder of the index.
        contents: where tokens are stored, a folder or an address such as `s3://bucket/folder`; None: in the index.
        batch_size: the number of images encoded at a time; None: 64 on a GPU, and 4 for each core of a CPU, where
            larger batches take more memory and no less time.
        num_workers: the number of processes that open images; 0: none but this one, None: one for each core beside a
            GPU, and none on a CPU, where the threads that encode images open them too.

    Raises:
        ValueError: the source has no image, the index is of another model or version or is stored otherwise, an option
            is out of range, or the store does not answer.
        OSError: there is no such model, or the folder cannot be written to.
        ModuleNotFoundError: LanceDB is not installed.

    Example (`photos`, `run` and `index` as in the example of `Searcher`):
        >>> from loopitr import build_index
        >>> report = build_index(photos, run, index, device="cpu", num_workers=0, show_progress=False)
        >>> report.added, report.unchanged
        (0, 3)
    """
    check_whole(1, unset=True, batch_size=batch_size)
    check_whole(0, unset=True, num_workers=num_workers)
    if tokens is not None:
        check_known([*TOKEN_TYPES, "none"], tokens=tokens)
    if collection is not None and store is None:
        raise ValueError(f"collection {collection!r} is one of a Qdrant server: give its address as store")
    if "://" in str(output):
        raise ValueError(
            f"{output}: an index is a folder of this machine; only its contents can be elsewhere (contents)"
        )
    folder = user_path(output)
    _check_output(folder)
    if not isinstance(source, Source):
        source = open_source(source, images, image_column)
    check_images(source, "the source")
    if contents is not None and "://" not in str(contents):
        contents = str(user_path(contents).resolve())  # The index may be used from another folder.
    name = str(model)
    if isinstance(model, Retriever):
        name = str(model.model.name_or_path)
    else:
        model = Retriever.from_pretrained(model, device=device)
    name = str(user_path(name).resolve()) if user_path(name).exists() else name
    with writing(folder):
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            check_model(folder, manifest, model)
            kept = tokens if isinstance(model.model, LoopITRModel) else None  # A dual encoder's index has none.
            _check_same(folder, manifest, tokens=kept, store=store, collection=collection, contents=contents)
        else:
            kept = None if tokens == "none" else tokens or "fp16"
            where = {"store": store, "collection": collection or folder.resolve().name, "contents": contents}
            manifest = manifest_of(model, name, tokens=kept, **where)
            check_new(manifest)
            Contents.check_new(manifest)
            write_manifest(folder, manifest)
        size = batch_size or (4 * torch.get_num_threads() if model.device.type == "cpu" else 64)
        return Writer(folder, manifest, model).index(source, size, num_workers, show_progress)


def add_images(
    source: str | Path | Source,
    index: str | Path,
    *,
    images: str | Path | None = None,
    image_column: str = "image",
    model: str | Path | Retriever | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    show_progress: bool = True,
) -> IndexReport:
    """Add images to an existing index, by `build_index` with the model of the index.

    Raises:
        FileNotFoundError: there is no such index.
    """
    manifest = read_manifest(index)
    return build_index(
        source,
        model or model_of(index, manifest, device),
        index,
        images=images,
        image_column=image_column,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        show_progress=show_progress,
    )


def _check_same(folder: Path, manifest: Manifest, **given: str | None) -> None:
    """Check that an existing index has what is `given`, if anything is; it cannot be changed."""
    for name, value in given.items():
        own = getattr(manifest, name) or "none"
        if value is not None and value != own:
            raise ValueError(f"{folder} was made with {name} {own}, which cannot become {value}; use another folder")


def _check_output(folder: Path) -> None:
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    foreign = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if MANIFEST not in foreign and (other := [name for name in foreign if not name.startswith((MANIFEST, LOCK))]):
        raise ValueError(f"{folder} holds {other[0]} and no search index; choose an empty or a new folder")

"""The interface of the stores for the vectors of an index, and the choice of the one that a manifest names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .lance import Found, LanceImages, Row
from .manifest import Manifest, facts_of
from .stamps import Stamp


class ImageStore(Protocol):
    """The images of an index with their vectors and columns; `LanceImages` documents the methods."""

    def __len__(self) -> int: ...

    def version(self) -> int: ...

    def stamps(self) -> dict[int, Stamp]: ...

    def listed(self, where: str | None = None) -> list[Found]: ...

    def put(self, rows: Sequence[Row], replaced: Collection[int] = ()) -> None: ...

    def describe(self, columns: Mapping[int, Mapping[str, Any]]) -> None: ...

    def check(self, columns: Iterable[Mapping[str, Any]]) -> None: ...

    def delete(self, ids: Sequence[int]) -> None: ...

    def search(
        self, vector: np.ndarray, limit: int, where: str | None = None, *, exact: bool = False
    ) -> list[Found]: ...

    def finish(self) -> None: ...

    def columns(self) -> list[str]: ...

    def vector_index(self) -> str | None: ...


def open_images(folder: str | Path, manifest: Manifest, *, create: bool = False) -> ImageStore:
    """Open the store of an index, or create it.

    Raises:
        ValueError: the index is damaged, or its store does not answer.
        ModuleNotFoundError: the package of its store is not installed.
    """
    if manifest.store is None:
        return LanceImages.open(folder, manifest.embed_dim, facts=facts_of(manifest), create=create)
    from .qdrant import QdrantImages

    return QdrantImages.open(manifest, create=create)


def check_new(manifest: Manifest) -> None:
    """Check that the store of a new index has no such collection yet.

    Raises:
        ValueError: it has this collection already, or does not answer.
    """
    if manifest.store is not None:
        from .qdrant import QdrantImages

        QdrantImages.check_new(manifest)

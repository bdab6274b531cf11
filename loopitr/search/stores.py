"""Where the vectors of an index lie: what a store is asked, and which one a manifest names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .lance import Found, LanceImages, Row
from .manifest import Manifest
from .sources import Stamp


class ImageStore(Protocol):
    """The images of an index with their vectors and columns. `LanceImages` says what each method does."""

    def __len__(self) -> int: ...

    def stamps(self) -> dict[int, Stamp]: ...

    def listed(self, where: str | None = None) -> list[Found]: ...

    def put(self, rows: Sequence[Row], replaced: Collection[int] = ()) -> None: ...

    def delete(self, ids: Sequence[int]) -> None: ...

    def search(
        self, vector: np.ndarray, limit: int, where: str | None = None, *, exact: bool = False
    ) -> list[Found]: ...

    def finish(self) -> None: ...

    def columns(self) -> list[str]: ...

    def vector_index(self) -> str | None: ...


def open_images(folder: str | Path, manifest: Manifest, *, create: bool = False) -> ImageStore:
    """
    Raises:
        ValueError: a damaged index, or a store that does not answer.
        ModuleNotFoundError: its package is not installed.
    """
    if manifest.store is None:
        return LanceImages.open(folder, manifest.embed_dim, create=create)
    from .qdrant import QdrantImages

    return QdrantImages.open(manifest, create=create)


def check_new(manifest: Manifest) -> None:
    """
    Raises:
        ValueError: a store that does not answer, or that has this collection already.
    """
    if manifest.store is not None:
        from .qdrant import QdrantImages

        QdrantImages.check_new(manifest)

"""The contents that an index stores of its images: tokens for reranking, and the bytes of images that are not files.

They are in a LanceDB table of their own, on this machine or in object storage.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .lance import ALL, connect, delete_rows, put_rows, table_names, tidy
from .lance_checks import check_columns, check_facts, check_files, with_facts
from .lance_errors import line_of, reading, repair_of
from .manifest import TOKEN_TYPES, Manifest, facts_of

if TYPE_CHECKING:
    import pyarrow as pa

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Content:
    """The stored contents of an image: its `tokens [N, D]` or None, and its `encoded` file or None."""

    tokens: Tensor | None
    encoded: bytes | None


class Contents:
    """The table of tokens and encoded images, by id."""

    def __init__(self, table: Any, manifest: Manifest, place: str | Path) -> None:
        self.table, self.place = table, place
        self.dtype = getattr(torch, TOKEN_TYPES[manifest.tokens]) if manifest.tokens else None
        self.shape = manifest.token_shape

    @classmethod
    def open(cls, folder: str | Path, manifest: Manifest, *, create: bool = False) -> Contents:
        """Open the table, or create it.

        Raises:
            ValueError: there is no such table, it is damaged or of another index, or the storage does not answer.
        """
        import pyarrow as pa

        place = manifest.contents or folder
        columns = [("id", pa.int64()), ("tokens", pa.large_binary()), ("encoded", pa.large_binary())]
        facts = facts_of(manifest)
        schema = with_facts(pa.schema(columns), facts)
        try:
            check_files(Path(str(place), "contents.lance"))
            database = connect(place)
            if create and "contents" not in table_names(database):
                database.create_table("contents", schema=schema)
            table = database.open_table("contents")
            check_columns(table, schema)
            check_facts(table, facts)
            return cls(table, manifest, place)
        except (ValueError, RuntimeError, OSError) as error:
            problem = f"the contents of an index cannot be opened in {place}: {line_of(error)}"
            raise ValueError(f"{problem}; {repair_of(error)}") from error

    @classmethod
    def check_new(cls, manifest: Manifest) -> None:
        """Check that the place for the contents of a new index is free.

        Raises:
            ValueError: it holds the contents of another index.
        """
        if manifest.contents is None:
            return
        try:
            names = table_names(connect(manifest.contents))
        except (ValueError, RuntimeError, OSError) as error:
            place = manifest.contents
            raise ValueError(f"the contents of an index cannot be kept in {place}: {line_of(error)}") from error
        if "contents" in names:
            raise ValueError(f"{manifest.contents} holds the contents of an index already; choose another place")

    def check_room(self, count: int) -> None:
        """Check that the disk, if it is one, has room for the tokens of `count` images.

        Raises:
            ValueError: it has too little space.
        """
        place = Path(str(self.place))
        if self.dtype is None or self.shape is None or not place.is_dir():
            return
        need, free = count * math.prod(self.shape) * self.dtype.itemsize, shutil.disk_usage(place).free
        if need > free:
            sizes = f"{need / GIB:.1f} GiB, {free / GIB:.1f} are free"
            raise ValueError(f"{place}: keeping the tokens of {count} images needs {sizes}; index with tokens none")

    def ids(self) -> list[int]:
        """The ids of all images with contents."""
        with reading(self.place):
            return self.table.search(None).select(["id"]).limit(ALL).to_arrow()["id"].to_pylist()

    def put(
        self, ids: Sequence[int], tokens: Tensor | None, encoded: Sequence[bytes | None], replaced: Collection[int]
    ) -> None:
        """Store `tokens [n, N, D]`, in the type of the table, and `encoded` images, replacing those in `replaced`."""
        import pyarrow as pa

        if tokens is None and not any(encoded):
            return
        columns = {
            "id": pa.array(ids, pa.int64()),
            "tokens": pa.nulls(len(ids), pa.large_binary()) if tokens is None else _binary(tokens),
            "encoded": pa.array(encoded, pa.large_binary()),
        }
        put_rows(self.table, pa.table(columns), replace=bool(replaced))

    def get(self, ids: Sequence[int], *, encoded: bool = False) -> dict[int, Content]:
        """The contents of those images that have any.

        Args:
            encoded: read the encoded images instead of the tokens.
        """
        if not ids:
            return {}
        column = "encoded" if encoded else "tokens"
        query = self.table.search(None).where(f"id IN ({', '.join(map(str, ids))})")
        with reading(self.place):
            rows = query.select(["id", column]).limit(len(ids)).to_arrow()
        return {
            number.as_py(): self._content(cell.as_buffer(), encoded=encoded)
            for number, cell in zip(rows["id"], rows[column])
            if cell.is_valid
        }

    def delete(self, ids: Sequence[int]) -> None:
        """Delete the contents of these images."""
        delete_rows(self.table, ids)

    def finish(self) -> None:
        """Merge the files of many small writes."""
        tidy(self.table)

    def _content(self, buffer: Any, *, encoded: bool) -> Content:
        if encoded:
            return Content(tokens=None, encoded=buffer.to_pybytes())
        assert self.dtype is not None and self.shape is not None
        if buffer.size != math.prod(self.shape) * self.dtype.itemsize:
            raise ValueError(f"{self.place} is a damaged index: it has {buffer.size} bytes of tokens for an image")
        values = torch.frombuffer(bytearray(buffer), dtype=self.dtype)
        return Content(tokens=values.view(self.shape), encoded=None)


def _binary(tokens: Tensor) -> pa.LargeBinaryArray:
    """`tokens [n, N, D]` as `n` binary cells, without copying them."""
    import pyarrow as pa

    values = tokens.contiguous().view(torch.uint8).numpy()
    ends = np.arange(len(values) + 1, dtype=np.int64) * (values.nbytes // len(values))
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(values)]
    )

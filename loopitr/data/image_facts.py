"""What is known of a column of images before they are decoded: paths, sizes, and which images are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import DataError, stable_hash

if TYPE_CHECKING:
    import datasets

SAMPLE = 64  # bytes in the middle of a file, by which most files of the same size are told apart


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What is known of the images of a column without decoding them.

    Attributes:
        paths: an Arrow array, or None.
        missing: a mask of the rows without an image `[R]`.
        identities: the first row with the same image `[R]`: the same stored bytes or, without these, the same path.
        sizes: the number of bytes that are stored in the table `[R]`, -1 where none are.
    """

    paths: Any
    missing: np.ndarray
    identities: np.ndarray
    sizes: np.ndarray


def image_facts(dataset: datasets.Dataset, column: str) -> ImageFacts:
    """The paths, sizes and identities in an image column of an Arrow table.

    Of the stored bytes only those are read that may be the same as others: all bytes where an image is repeated for
    each of its captions, otherwise a few of each image.

    Raises:
        DataError: the column is a struct without `path` and `bytes`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = dataset.data.column(column)
    paths = data = None
    missing = pc.is_null(values)
    if pa.types.is_struct(values.type):
        if not {"path", "bytes"} <= {field.name for field in values.type}:
            raise DataError(f"image column {column!r} is a struct without 'path' and 'bytes': {values.type}")
        paths, data = pc.struct_field(values, "path"), pc.struct_field(values, "bytes")
        missing = pc.and_(pc.is_null(paths), pc.is_null(data))
    elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        paths = values
    elif pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        data = values
    identities, sizes = np.arange(len(values)), np.full(len(values), -1, dtype=np.int64)
    if paths is not None:
        codes = paths.combine_chunks().dictionary_encode().indices
        codes = pc.fill_null(pc.cast(codes, pa.int64()), -1).to_numpy()
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        identities = np.where(codes < 0, identities, first[inverse])
    if data is not None:
        sizes = pc.coalesce(pc.cast(pc.binary_length(data), pa.int64()), -1).to_numpy()
        # Paths beside stored bytes are often only base names, which different images may share.
        identities = np.where(sizes > 0, _first_with_same_bytes(data, sizes), identities)
    return ImageFacts(paths=paths, missing=missing.to_numpy(), identities=identities, sizes=sizes)


def _first_with_same_bytes(data: Any, sizes: np.ndarray) -> np.ndarray:
    """For each row the first row with the same bytes `[R]`; `data` is a chunked Arrow array."""
    same = np.arange(len(sizes))
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    rows = first = np.flatnonzero((counts[inverse] > 1) & (sizes > 0))
    for part in (_sample, memoryview):
        digests = np.fromiter((stable_hash(part(content)) for content in _contents(data, rows)), np.int64, len(rows))
        _, index, inverse, counts = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
        repeated = counts[inverse] > 1
        rows, first = rows[repeated], rows[index[inverse]][repeated]
    same[rows] = first
    return same


def _contents(data: Any, rows: np.ndarray) -> Iterator[Any]:
    """The bytes at `rows`, without a copy."""
    ends = np.cumsum([len(chunk) for chunk in data.chunks])
    for row, chunk in zip(rows.tolist(), np.searchsorted(ends, rows, side="right").tolist()):
        part = data.chunk(chunk)
        yield part[row - int(ends[chunk]) + len(part)].as_buffer()


def _sample(content: Any) -> memoryview:
    middle = len(content) // 2
    return memoryview(content)[middle : middle + SAMPLE]

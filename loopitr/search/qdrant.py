"""An index whose vectors are on a Qdrant server, for more images or readers than one machine can serve."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import numpy as np

from .conditions import SHOWN, parse_condition, shown_condition
from .lance import Found, Row
from .manifest import Manifest
from .stamps import Stamp, micros_of, time_of

PAGE = 1000  # the number of points that are read, or at most written, at a time
REQUEST_BYTES = 2**23  # of the points written at a time, roughly; a server takes 32 MiB
NUMBER_BYTES = 24  # of a number of a vector as JSON, at most
TIMEOUT = 30  # seconds
OWN = {"path": "keyword", "size": "integer", "mtime": "datetime", "width": "integer", "height": "integer"}
ADDRESS = ("http://", "https://")
_LOCAL: dict[str, Any] = {}  # clients of local folders, each of which only one client may open


class QdrantImages:
    """The images of an index in a Qdrant collection, with the methods of `LanceImages`.

    `conditions.py` says which conditions are possible.
    """

    def __init__(self, client: Any, collection: str, store: str) -> None:
        self.client, self.collection, self.store = client, collection, store

    @classmethod
    def open(cls, manifest: Manifest, *, create: bool = False) -> QdrantImages:
        """Open the collection, or create it.

        Raises:
            ValueError: the server does not answer, or does not have the collection.
            ModuleNotFoundError: Qdrant's client is not installed.
        """
        store, collection = str(manifest.store), str(manifest.collection)
        images = cls(_client(store), collection, store)
        from qdrant_client import models

        with _answering(store):
            if images.client.collection_exists(collection):
                vectors = images.client.get_collection(collection).config.params.vectors
                if getattr(vectors, "distance", None) != models.Distance.DOT:
                    raise ValueError(f"{collection!r} is not of an index: it does not compare vectors by dot product")
                if vectors.size != manifest.embed_dim:
                    problem = f"{collection!r} holds vectors of {vectors.size} dimensions"
                    raise ValueError(f"{problem}, wanted {manifest.embed_dim}")
            elif create:
                vectors = models.VectorParams(size=manifest.embed_dim, distance=models.Distance.DOT)
                images.client.create_collection(collection, vectors_config=vectors)
                images._index(OWN)
            else:
                raise ValueError(f"it has no collection {collection!r}")
        return images

    @classmethod
    def check_new(cls, manifest: Manifest) -> None:
        """Check that the collection of a new index does not exist.

        Raises:
            ValueError: it exists, or the server does not answer.
        """
        client = _client(str(manifest.store))
        with _answering(str(manifest.store)):
            if client.collection_exists(manifest.collection):
                raise ValueError(f"it has a collection {manifest.collection!r} already; choose another name")

    def __len__(self) -> int:
        with _answering(self.store):
            return self.client.count(self.collection, exact=True).count

    def version(self) -> int:
        """The number of images: a server does not tell of other changes."""
        return len(self)

    def stamps(self) -> dict[int, Stamp]:
        points = self._scroll(None, with_payload=["size", "mtime"])
        return {point.id: (point.payload["size"], _micros(point.payload["mtime"])) for point in points}

    def listed(self, where: str | None = None) -> list[Found]:
        return [_found(point, 0.0) for point in self._scroll(self._filter(where), with_payload=True)]

    def put(self, rows: Sequence[Row], replaced: Collection[int] = ()) -> None:
        """Add images. Points of the same id are always replaced, so `replaced` is not used."""
        for points in _requests(rows):
            with _answering(self.store):
                self.client.upsert(self.collection, points, wait=True)

    def describe(self, columns: Mapping[int, Mapping[str, Any]]) -> None:
        from qdrant_client import models

        operations: list[Any] = []
        for number, given in columns.items():
            values = {name: value for name, value in given.items() if value is not None}
            gone = [name for name in given if name not in values]
            operations.append(
                models.SetPayloadOperation(set_payload=models.SetPayload(payload=values, points=[number]))
            )
            if gone:
                removal = models.DeletePayload(keys=gone, points=[number])
                operations.append(models.DeletePayloadOperation(delete_payload=removal))
        for start in range(0, len(operations), PAGE):
            with _answering(self.store):
                self.client.batch_update_points(self.collection, operations[start : start + PAGE], wait=True)

    def check(self, columns: Iterable[Mapping[str, Any]]) -> None:
        """Does nothing, since each image's values may be of any type."""

    def delete(self, ids: Sequence[int]) -> None:
        from qdrant_client import models

        for start in range(0, len(ids), PAGE):
            selected = models.PointIdsList(points=list(ids[start : start + PAGE]))
            with _answering(self.store):
                self.client.delete(self.collection, selected, wait=True)

    def search(self, vector: np.ndarray, limit: int, where: str | None = None, *, exact: bool = False) -> list[Found]:
        from qdrant_client import models

        chosen = self._filter(where)
        with _answering(self.store):
            points = self.client.query_points(
                self.collection,
                query=vector.astype(np.float32).tolist(),
                query_filter=chosen,
                search_params=models.SearchParams(exact=exact),
                limit=limit,
                with_payload=True,
            ).points
        return [_found(point, point.score) for point in points]

    def finish(self) -> None:
        """Have the server index new columns for conditions; it indexes the vectors by itself."""
        self._index({name: _kind(value) for name, value in self._examples().items() if name not in OWN})

    def columns(self) -> list[str]:
        """The columns of the first 100 images, since a collection has no list of its columns."""
        return list(dict.fromkeys([*OWN, *self._examples()]))

    def vector_index(self) -> str | None:
        return "HNSW"

    def _examples(self) -> dict[str, Any]:
        """A value of each column that the first 100 images have."""
        with _answering(self.store):
            points, _ = self.client.scroll(self.collection, limit=100, with_payload=True)
        return {name: value for point in reversed(points) for name, value in point.payload.items() if name != "file"}

    def _index(self, kinds: Mapping[str, str]) -> None:
        """Index columns on the server, without which a condition reads all images, and may be refused."""
        if not self.store.startswith(ADDRESS):
            return
        with _answering(self.store):
            indexed = self.client.get_collection(self.collection).payload_schema
            for name in kinds.keys() - indexed.keys():
                self.client.create_payload_index(self.collection, name, field_schema=kinds[name], wait=True)

    def _filter(self, where: str | None) -> Any:
        """The Qdrant filter for a condition.

        Raises:
            ValueError: the condition is not valid, or no image has one of its columns.
        """
        from qdrant_client import models

        if where is None:
            return None
        condition = parse_condition(where)
        for column in sorted(condition.columns):
            empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=column))
            with _answering(self.store):
                has = models.Filter(must_not=[empty])
                found, _ = self.client.scroll(self.collection, scroll_filter=has, limit=1, with_payload=False)
            if column == "file" or not found:
                missing = f"no image has a column {column[:SHOWN]!r}; there are {self.columns()}"
                raise ValueError(f"{shown_condition(where)}: {missing}")
        return condition.filter

    def _scroll(self, chosen: Any, **wanted: Any) -> Iterator[Any]:
        offset = None
        while True:
            with _answering(self.store):
                points, offset = self.client.scroll(
                    self.collection, scroll_filter=chosen, limit=PAGE, offset=offset, **wanted
                )
            yield from points
            if offset is None:
                return


def _client(store: str) -> Any:
    try:
        from qdrant_client import QdrantClient
    except ModuleNotFoundError as error:
        message = 'an index on a Qdrant server needs its client: pip install "loopitr[qdrant]"'
        raise ModuleNotFoundError(message) from error
    is_address = store.startswith(ADDRESS)
    if not is_address and ("://" in store or os.sep not in store):
        raise ValueError(f"the store {store}: not an address such as http://host:6333 (nor a folder such as ./vectors)")
    with _answering(store):
        key = os.environ.get("QDRANT_API_KEY")
        if is_address:
            return QdrantClient(url=store, api_key=key, timeout=TIMEOUT, check_compatibility=False)
        folder = os.path.abspath(store)
        if folder not in _LOCAL:
            _LOCAL[folder] = QdrantClient(path=folder)
            atexit.register(_LOCAL[folder].close)
        return _LOCAL[folder]


@contextmanager
def _answering(store: str) -> Iterator[None]:
    """A context in which the errors of a client become a ValueError that names the server."""
    import httpx
    from qdrant_client.http.exceptions import ApiException

    try:
        yield
    except (ApiException, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        text = str(error)
        if text.startswith("the store "):
            raise
        raise ValueError(f"the store {store}: {' '.join(text.split()) or type(error).__name__}") from error


def _requests(rows: Sequence[Row]) -> Iterator[list[Any]]:
    """The rows as points, as many in a request as its size allows."""
    from qdrant_client import models

    points: list[Any] = []
    size = 0
    for row in rows:
        payload = _payload(row)
        own = NUMBER_BYTES * len(row.embed) + len(json.dumps(payload))
        if points and (size + own > REQUEST_BYTES or len(points) == PAGE):
            yield points
            points, size = [], 0
        points.append(models.PointStruct(id=row.id, vector=row.embed.tolist(), payload=payload))
        size += own
    if points:
        yield points


def _kind(value: Any) -> str:
    """The kind of an index on a column with this value; `float` takes all numbers, and `text` finds words."""
    if isinstance(value, bool):
        return "bool"
    return "float" if isinstance(value, (int, float)) else "text"


def _payload(row: Row) -> dict[str, Any]:
    """The payload of a point; the bytes of a path may not be valid text, and are stored as Latin-1."""
    mtime = time_of(row.stamp).isoformat()
    own = {"file": row.file.decode("latin-1"), "path": row.path, "size": row.stamp[0], "mtime": mtime}
    others: Mapping[str, Any] = {name: value for name, value in row.columns.items() if value is not None}
    return {**others, **own, "width": row.width, "height": row.height}


def _micros(mtime: str) -> int:
    return micros_of(datetime.fromisoformat(mtime))


def _found(point: Any, similarity: float) -> Found:
    payload = dict(point.payload)
    file, path = payload.pop("file").encode("latin-1"), payload.pop("path")
    payload["mtime"] = datetime.fromisoformat(payload["mtime"])
    return Found(id=point.id, file=file, path=path, similarity=similarity, columns=payload)

"""The images of an index in LanceDB: their vectors, and the columns that searches can filter by."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .conditions import check_condition, shown_condition
from .lance_checks import check_columns, check_facts, check_files, with_facts
from .lance_columns import cell_of, check_cells, new_fields
from .lance_errors import line_of, reading, repair_of, writing_to
from .stamps import Stamp, time_of

if TYPE_CHECKING:
    import pyarrow as pa

ALL = 2**32 - 1  # no limit
KEPT = timedelta(hours=1)  # how long old versions of a table are kept, for searches that still read them
INDEXED_FROM = 20_000  # the number of images from which a vector index is faster than comparing with all
PARTITIONS = 2**20  # more than any vector index has
PER_RESULT = 100  # the number of images that are compared for each result, at least
HIDDEN = ("id", "file", "embed")  # internal columns, which are not in results


@dataclass(frozen=True, kw_only=True)
class Found:
    """An image of an index: its `id`, the bytes of its path (`file`), its path as text, and its other columns."""

    id: int
    file: bytes
    path: str
    similarity: float
    columns: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """An image to store, with its embed `[E]`."""

    id: int
    file: bytes
    path: str
    stamp: Stamp
    width: int
    height: int
    columns: Mapping[str, Any]
    embed: np.ndarray


def connect(folder: str | Path) -> Any:
    """Open a LanceDB database.

    Raises:
        ModuleNotFoundError: LanceDB is not installed.
    """
    try:
        import lancedb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('searching needs LanceDB: pip install "loopitr[search]"') from error
    # With this interval, every read checks for a newer version of the table.
    return lancedb.connect(str(folder), read_consistency_interval=timedelta(0))


class LanceImages:
    """The table of an index's images, whose writes are atomic."""

    def __init__(self, table: Any, embed_dim: int, folder: str | Path) -> None:
        self.table, self.embed_dim, self.folder = table, embed_dim, folder

    @classmethod
    def open(
        cls, folder: str | Path, embed_dim: int, *, facts: Mapping[str, str] | None = None, create: bool = False
    ) -> LanceImages:
        """Open the table, or create it with the `facts` of the manifest, which are compared with them later.

        Raises:
            ValueError: there is no such table, it is damaged, or it has other facts.
        """
        schema = with_facts(_schema(embed_dim), facts or {})
        try:
            database = connect(folder)
            check_files(Path(folder, "images.lance"))
            if create and "images" not in table_names(database):
                database.create_table("images", schema=schema)
            table = database.open_table("images")
            check_columns(table, schema)
            check_facts(table, facts or {})
            return cls(table, embed_dim, folder)
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"{folder} is a damaged index: {line_of(error)}; {repair_of(error)}") from error

    def __len__(self) -> int:
        return self.table.count_rows()

    def version(self) -> int:
        """A number that is another one after a write."""
        return int(self.table.version)

    def stamps(self) -> dict[int, Stamp]:
        """The stamps of all images, by id."""
        with reading(self.folder):
            rows = self.table.search(None).select(["id", "size", "mtime"]).limit(ALL).to_arrow()
        micros = rows["mtime"].cast("int64").to_pylist()
        return dict(zip(rows["id"].to_pylist(), zip(rows["size"].to_pylist(), micros)))

    def listed(self, where: str | None = None) -> list[Found]:
        """All images, or those for which an SQL condition holds."""
        query = self.table.search(None)
        query = query if where is None else query.where(_whole(where))
        rows = self._asked(query, where, limit=ALL, names=self._names())
        return [_found(row, 0.0) for row in rows]

    def put(self, rows: Sequence[Row], replaced: Collection[int] = ()) -> None:
        """Add images; those with ids in `replaced` replace their earlier rows."""
        import pyarrow as pa

        self._add_columns([row.columns for row in rows])
        schema = self.table.schema
        extra = [name for name in schema.names if name not in _schema(self.embed_dim).names]
        columns = {
            "id": [row.id for row in rows],
            "file": [row.file for row in rows],
            "path": [row.path for row in rows],
            "size": [row.stamp[0] for row in rows],
            "mtime": [time_of(row.stamp) for row in rows],
            "width": [row.width for row in rows],
            "height": [row.height for row in rows],
            "embed": _vectors(np.stack([row.embed for row in rows])),
            **{name: [cell_of(row.columns.get(name), schema.field(name)) for row in rows] for name in extra},
        }
        arrow = pa.table({name: columns[name] for name in schema.names}, schema=schema)
        put_rows(self.table, arrow, replace=bool(replaced))

    def describe(self, columns: Mapping[int, Mapping[str, Any]]) -> None:
        """Replace columns of images, by id; columns that are not given stay."""
        import pyarrow as pa

        self._add_columns(columns.values())
        alike: dict[tuple[str, ...], list[int]] = {}  # Images with the same columns are written together.
        for number, given in columns.items():
            alike.setdefault(tuple(name for name in given if name in self.table.schema.names), []).append(number)
        for names, ids in alike.items():
            fields = [self.table.schema.field(name) for name in ("id", *names)]
            cells = [[cell_of(columns[number][field.name], field) for number in ids] for field in fields[1:]]
            rows = pa.table([ids, *cells], schema=pa.schema(fields))
            with writing_to(self.table):
                self.table.merge_insert("id").when_matched_update_all().execute(rows)

    def _add_columns(self, rows: Iterable[Mapping[str, Any]]) -> None:
        new = new_fields(rows, self.table.schema)
        if new:
            with writing_to(self.table):
                self.table.add_columns(new)

    def check(self, columns: Iterable[Mapping[str, Any]]) -> None:
        """Check that the other columns of images to store, one mapping per image, fit those that there are.

        Raises:
            ValueError: a value is not of the type of its column.
        """
        check_cells(columns, self.table.schema)

    def delete(self, ids: Sequence[int]) -> None:
        """Delete images by id."""
        delete_rows(self.table, ids)

    def search(self, vector: np.ndarray, limit: int, where: str | None = None, *, exact: bool = False) -> list[Found]:
        """The images nearest to `vector [E]`, best first.

        A vector index is searched in part. With a condition it is searched whole, which is as exact as comparing with
        every image: the few images that meet a condition may be in any part.

        Args:
            where: an SQL condition on the columns.
            exact: compare with every image, even if there is a vector index.

        Raises:
            ValueError: the condition is not valid SQL, or has an unknown column.
        """
        query = self.table.search(vector.astype(np.float32), vector_column_name="embed").distance_type("dot")
        count = len(self)
        limit = min(limit, max(1, count))
        probes = _probes(count, limit) if where is None else PARTITIONS
        query = query.bypass_vector_index() if exact else query.nprobes(probes)
        query = query if where is None else query.where(_whole(where), prefilter=True)
        rows = self._asked(query, where, limit=limit, names=[*self._names(), "_distance"])
        return [_found(row, 1.0 - row.pop("_distance")) for row in rows]

    def finish(self) -> None:
        """Merge many small writes, and make a vector index if there are many images."""
        from lancedb.index import IvfFlat

        tidy(self.table)
        count = len(self)
        if count > INDEXED_FROM and self.vector_index() is None:
            config = IvfFlat(distance_type="dot", num_partitions=_partitions(count))
            with writing_to(self.table):
                self.table.create_index("embed", config=config)

    def columns(self) -> list[str]:
        """The columns that searches can filter by."""
        return [name for name in self.table.schema.names if name not in HIDDEN]

    def vector_index(self) -> str | None:
        """The type of the vector index; None: there is none."""
        indices = [index for index in self.table.list_indices() if "embed" in index.columns]
        return str(indices[0].index_type) if indices else None

    def _asked(self, query: Any, where: str | None, *, limit: int, names: list[str]) -> list[dict[str, Any]]:
        if where is None:
            with reading(self.folder):
                return query.select(names).limit(limit).to_arrow().to_pylist()
        try:
            return query.select(names).limit(limit).to_arrow().to_pylist()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{shown_condition(where)}: {line_of(error)}") from error

    def _names(self) -> list[str]:
        return [name for name in self.table.schema.names if name != "embed"]


def table_names(database: Any) -> list[str]:
    """The names of a database's tables."""
    return list(database.list_tables().tables)


def _schema(embed_dim: int) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.int64()),
            pa.field("file", pa.binary()),
            pa.field("path", pa.string()),
            pa.field("size", pa.int64()),
            pa.field("mtime", pa.timestamp("us", tz="UTC")),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("embed", pa.list_(pa.float32(), embed_dim)),
        ]
    )


def _vectors(embeds: np.ndarray) -> pa.FixedSizeListArray:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(embeds, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, embeds.shape[1])


def tidy(table: Any) -> None:
    """Merge the files of many small writes, and add them to the vector index if there is one."""
    with writing_to(table):
        table.optimize(cleanup_older_than=KEPT)


def put_rows(table: Any, rows: pa.Table, *, replace: bool) -> None:
    """Add rows; with `replace`, they replace rows of the same id."""
    with writing_to(table):
        if replace:
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)
        else:
            table.add(rows)


def delete_rows(table: Any, ids: Sequence[int]) -> None:
    """Delete rows by id."""
    with writing_to(table):
        for start in range(0, len(ids), 10_000):
            table.delete(f"id IN ({', '.join(map(str, ids[start : start + 10_000]))})")


def _whole(where: str) -> str:
    """The condition in parentheses; otherwise LanceDB ignores anything after a complete condition."""
    check_condition(where)
    return f"({where})"


def _found(row: dict[str, Any], similarity: float) -> Found:
    others = {name: value for name, value in row.items() if name not in (*HIDDEN, "path") and value is not None}
    return Found(id=row["id"], file=row["file"] or b"", path=row["path"] or "", similarity=similarity, columns=others)


def _partitions(count: int) -> int:
    return max(1, round(count**0.5))


def _probes(count: int, limit: int) -> int:
    """The number of partitions to search, enough to find the exact top 100 (recipes/benchmarks/search.py)."""
    probes = max(20, _partitions(count) // 8)
    return probes if limit * PER_RESULT <= probes * count / _partitions(count) else PARTITIONS

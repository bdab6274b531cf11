"""The types of the columns that an index in LanceDB takes over from its sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def new_fields(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> list[pa.Field]:
    """The columns of `rows` that `schema` lacks, with the type of their first value."""
    import pyarrow as pa

    types: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None and name not in types and name not in schema.names:
                types[name] = _type_of(value)
    return [pa.field(name, kind) for name, kind in types.items()]


def check_cells(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Check that a table of this schema can take all values of `rows`, some of which may be of new columns.

    Raises:
        ValueError: a value is not of the type of its column.
    """
    fields = {field.name: field for field in schema}
    for row in rows:
        fields |= {field.name: field for field in new_fields([row], schema) if field.name not in fields}
        for name, value in row.items():
            if value is not None:
                cell_of(value, fields[name])


def cell_of(value: Any, field: pa.Field) -> Any:
    """`value` as the column `field` holds it; a column of texts takes any value.

    Raises:
        ValueError: the value is not of the type of the column.
    """
    import pyarrow as pa

    if value is None:
        return None
    try:
        cell = pa.scalar(str(value) if pa.types.is_string(field.type) else value, type=field.type).as_py()
        if isinstance(value, (int, float)) and not pa.types.is_string(field.type) and cell != value:
            raise OverflowError(f"{value!r} would become {cell!r}")
        return cell
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        problem = f"column {field.name!r} of the index holds {field.type}, and is now to hold {value!r}"
        raise ValueError(f"{problem}; give that column another name") from error


def _type_of(value: Any) -> pa.DataType:
    import pyarrow as pa

    if isinstance(value, bool):
        return pa.bool_()
    return pa.int64() if isinstance(value, int) else pa.float64() if isinstance(value, float) else pa.string()

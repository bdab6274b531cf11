"""Checks of a LanceDB table that somebody else may have made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


PREFIX = "loopitr."  # of the manifest's facts among a table's metadata


def check_files(table: Path) -> None:
    """Check that a table in a local folder consists of files: LanceDB would wait for a pipe forever.

    Raises:
        ValueError: it does not.
    """
    for folder, _, names in os.walk(table):
        for name in names:
            path = Path(folder, name)
            if path.exists() and not path.is_file():
                raise ValueError(f"{path} is not a file")


def check_columns(table: Any, wanted: pa.Schema) -> None:
    """
    Raises:
        ValueError: a column is missing, or of another type.
    """
    for field in wanted:
        found = table.schema.field(field.name).type if field.name in table.schema.names else "missing"
        if found != field.type:
            raise ValueError(f"its column {field.name!r} is {found}, wanted {field.type}")


def with_facts(schema: pa.Schema, facts: Mapping[str, str]) -> pa.Schema:
    """`schema` with `facts` of the manifest in its metadata."""
    return schema.with_metadata({PREFIX + name: value for name, value in facts.items()})


def check_facts(table: Any, facts: Mapping[str, str]) -> None:
    """Check that a table was made with these facts of the manifest, as far as it says so.

    Raises:
        ValueError: it says something else.
    """
    stored = {name.decode(): value.decode("utf-8", "replace") for name, value in (table.schema.metadata or {}).items()}
    for name, value in facts.items():
        own = stored.get(PREFIX + name, value)
        if own != value:
            raise ValueError(f"its {name!r} is {own} in the table {table.name!r}, but {value} in the manifest")

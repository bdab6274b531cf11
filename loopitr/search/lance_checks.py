"""Checks of a LanceDB table that somebody else may have made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


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

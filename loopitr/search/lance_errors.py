"""LanceDB's errors as one line that names the index or the table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turns LanceDB's errors into one that names the index.

    Raises:
        ValueError: what is read in the block is damaged or gone.
    """
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{folder}: the index cannot be read: {line_of(error)}") from error


@contextmanager
def writing_to(table: Any) -> Iterator[None]:
    """A context in which LanceDB's errors, which are RuntimeErrors even for a full disk, become one OSError.

    Raises:
        OSError: the table, which it names, cannot be written to.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise OSError(f"table {table.name!r} of the index cannot be written to: {line_of(error)}") from error


def repair_of(error: Exception) -> str:
    """What helps against an error on opening a table: one that is missing is made by indexing again."""
    return "repeat `loopitr search index`" if "was not found" in str(error) else "index again into another folder"


def line_of(error: Exception) -> str:
    """LanceDB's message without the position in its source."""
    text = " ".join(str(error).split())
    return text.removeprefix("Invalid input, ").partition(", /")[0]

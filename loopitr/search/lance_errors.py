"""LanceDB's errors as one line that names the index or the table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# In the errors of object storage, the best first.
CAUSES = (
    r"<Message>(.*?)</Message>",
    r'message: "(.*?)"',
    r"(Failed to get \w+ credentials|dns error)",
    r"(status: \d+)",
)
LONGEST = 300  # characters of a message


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
    if "was not found" in str(error):
        return "repeat `loopitr search index`"
    if _of_storage(str(error)):
        return "check its address, and the key and the endpoint in the environment (AWS_ENDPOINT_URL, ...)"
    return "index again into another folder"


def line_of(error: Exception) -> str:
    """LanceDB's message in one line, without the position in its source; of a long one, only the cause."""
    text = " ".join(str(error).split())
    causes = [found[1] for pattern in CAUSES if (found := re.search(pattern, text))]
    if _of_storage(text) and causes:
        return f"the storage does not answer as expected: {causes[0]}"
    line = text.removeprefix("Invalid input, ").partition(", /")[0]
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _of_storage(text: str) -> bool:
    return 'store: "' in text and 'store: "LocalFileSystem' not in text

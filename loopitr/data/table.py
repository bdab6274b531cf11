"""CSV, TSV and JSON-lines files of image paths and captions."""

from __future__ import annotations

import ast
import csv
import io
import json
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

from loopitr.reading import parse_json

from .files import Row, group_rows, read_text
from .records import DataError, Record, printable
from .report import LoadReport

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")


def load_table(
    path: str | Path,
    images: str | Path | None,
    report: LoadReport,
    image_column: str = "image",
    caption_column: str = "caption",
    split: str | None = None,
    split_column: str = "split",
) -> list[Record]:
    """One record per image of a table, with the captions of all its rows.

    Args:
        path: a file whose name ends in .csv, .tsv, .jsonl or .ndjson.
        images: the folder that relative image paths start from; None: the folder of the table.
        report: counts what was read and what was skipped.
        caption_column: a cell of this column is a text or a (JSON) list of texts.
        split: read only the rows with this value in `split_column`; None: all rows.

    Raises:
        DataError: the table cannot be read, a column is missing, or the images are not found.
    """
    rows, columns = read_table(path)
    wanted = [image_column, caption_column] + ([] if split is None else [split_column])
    for column in wanted:
        if column not in columns:
            raise DataError(f"{path}: no column {column!r}; it has {printable(', '.join(columns)) or 'none'}")
    if split is not None:
        splits = sorted({name for row in rows if (name := _split(row.get(split_column)))})
        if split not in splits:
            known = printable(", ".join(splits))
            raise DataError(f"{path}: no split {split!r} in column {split_column!r}; it has {known or 'none'}")
    chosen = []
    for number, row in enumerate(rows, start=1):
        row_split = None if split is None else _split(row.get(split_column))
        image = row.get(image_column)
        if split is not None and row_split is None:
            report.skip("no split", f"{Path(path).name} row {number}")
        elif row_split != split:
            continue
        elif not isinstance(image, str) or not image.strip():
            report.skip("no image path", f"{Path(path).name} row {number}")
        else:
            captions = captions_of_cell(row.get(caption_column))
            chosen.append(Row(image=image.strip(), captions=captions, identity=image.strip()))
    return group_rows(chosen, source=path, images=images, split=split, report=report)


def table_columns(path: str | Path) -> list[str]:
    """The names of a table's columns, in order of appearance."""
    return read_table(path)[1]


def read_table(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a table as dicts, and its column names in order of appearance.

    Raises:
        DataError: the file cannot be read, or is not a valid table.
    """
    suffix = Path(path).suffix.lower()
    if suffix in JSON_LINES:
        return _read_json_lines(path)
    if suffix not in DELIMITERS:
        raise DataError(f"{path}: a table ends in {', '.join([*DELIMITERS, *JSON_LINES])}; got {suffix or 'no ending'}")
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=DELIMITERS[suffix], strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from error
    duplicates = [name for name, count in Counter(reader.fieldnames or []).items() if count > 1]
    if duplicates:  # csv would silently keep the last of them.
        raise DataError(f"{path}: the header names {', '.join(map(repr, duplicates))} more than once")
    if any(None in row for row in rows):
        number = next(i for i, row in enumerate(rows, start=1) if None in row)
        raise DataError(f"{path}: row {number} has more cells than the header; quote captions that hold a delimiter")
    return rows, list(reader.fieldnames or [])


def _read_json_lines(path: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    rows = []
    for number, line in enumerate(io.StringIO(read_text(path)), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is not a JSON object but {type(row).__name__}")
        rows.append(row)
    return rows, list(dict.fromkeys(column for row in rows for column in row))


def _split(cell: Any) -> str | None:
    """The split in a cell, given as text or number; None: the cell has none."""
    if isinstance(cell, bool) or not isinstance(cell, (str, int)):
        return None
    return str(cell).strip() or None


def captions_of_cell(cell: Any) -> Any:
    """The captions in a cell: a list as JSON, pandas or NumPy write it; any other text is one caption."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            try:
                value = _python_list(cell.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return cell
        if isinstance(value, list) and all(isinstance(item, (str, type(None))) for item in value):
            return value
    return cell


def _python_list(cell: str) -> Any:
    value = ast.literal_eval(cell)
    # NumPy writes no commas between items, and Python joins texts that follow each other to one.
    tokens = tokenize.generate_tokens(io.StringIO(cell).readline)
    texts = [token.string for token in tokens if token.type == tokenize.STRING]
    is_joined = isinstance(value, list) and len(texts) > sum(isinstance(item, str) for item in value)
    return [ast.literal_eval(text) for text in texts] if is_joined else value

"""The choice of the image and the caption column of a `datasets` source, and the reading of their cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .records import DataError

IMAGE_GUESSES = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_GUESSES = ("caption", "captions", "text", "txt", "sentences", "json.captions", "json.caption")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a source that are read.

    `caption` may be dotted, for a field inside a struct column; `caption_root` is that column.
    """

    image: str
    caption: str
    caption_root: str


def choose_columns(source: str, columns: Mapping[str, Any], image: str | None, caption: str | None) -> Columns:
    """The columns that the caller named, or else the only column of each kind with a usual name.

    Args:
        columns: the feature types by column name.
        image, caption: the columns that the caller named; None: choose by name.

    Raises:
        DataError: a named column is missing, or there is not exactly one column with a usual name.
    """
    image = choose_image_column(source, columns, image)
    caption = _choose(source, columns, caption, CAPTION_GUESSES, kind="caption")
    return Columns(image=image, caption=caption, caption_root=str(_root(columns, caption)))


def choose_image_column(source: str, columns: Mapping[str, Any], image: str | None) -> str:
    """The image column; see `choose_columns`."""
    image = _choose(source, columns, image, IMAGE_GUESSES, kind="image")
    if _root(columns, image) != image:
        raise DataError(f"{source}: the image column cannot be a field inside a column, got {image!r}")
    return image


def _choose(source: str, columns: Mapping[str, Any], wanted: str | None, guesses: tuple[str, ...], *, kind: str) -> str:
    listed = ", ".join(_describe(name, feature) for name, feature in columns.items())
    if wanted is not None:
        if _root(columns, wanted) is None:
            raise DataError(f"{source}: no {kind} column {wanted!r}; its columns are {listed}")
        return wanted
    candidates = [name for name in guesses if _root(columns, name)]
    if kind == "caption":  # A struct is not a caption; the caller has to name one of its fields.
        candidates = [name for name in candidates if not _fields(columns.get(name))]
    if len(candidates) == 1:
        return candidates[0]
    options = " or ".join(candidates)
    problem = f"the {kind} column may be {options}" if candidates else f"no {kind} column found"
    raise DataError(f"{source}: {problem}; name it with {kind}_column; its columns are {listed}")


def any_json(features: Any, column: str) -> Any:
    """The feature types of a WebDataset, but with a type that allows any JSON for `column` if it holds JSON files.

    `datasets` infers the types from the first samples and casts all others to them: if captions are lists there and a
    text later, the text would become a list of letters.
    """
    import datasets

    if not hasattr(datasets, "Json"):
        return features
    if isinstance(features[column], datasets.Value) and column.rpartition(".")[2] != "json":
        return features
    return datasets.Features({**features, column: datasets.Json()})


def _root(columns: Mapping[str, Any], name: str) -> str | None:
    """The column that a possibly dotted name starts with, or None. A column whose whole name has dots comes first."""
    if name in columns:
        return name
    root, _, rest = name.partition(".")
    if not rest or root not in columns:
        return None
    feature: Any = columns[root]
    for part in rest.split("."):
        feature = _fields(feature)
        if feature is None:
            return root  # The type is unknown, as in free JSON; reading the rows will show whether the field exists.
        if part not in feature:
            return None
        feature = feature[part]
    return root


def _fields(feature: Any) -> Mapping[str, Any] | None:
    """The fields of a struct, or of a list of structs; none for a plain value; None where the type is unknown."""
    while isinstance(feature, (list, tuple)) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, (list, tuple)) else feature.feature
    if isinstance(feature, Mapping):
        return feature
    return None if feature is None or type(feature).__name__ == "Json" else {}


def _describe(name: str, feature: Any) -> str:
    fields = _fields(feature)
    return f"{name} (fields: {', '.join(fields)})" if fields else name


def dotted_value(row: Mapping[str, Any], path: str, root: str) -> Any:
    """The value at a dotted path. If the path leads through a list, it is read from each item (`sentences.raw`)."""
    value: Any = row[root]
    for part in path[len(root) + 1 :].split(".") if path != root else []:
        if isinstance(value, (list, tuple)):
            value = [item.get(part) if isinstance(item, Mapping) else None for item in value]
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def image_value(value: Any, name: str) -> str | bytes | None:
    """The encoded bytes or the path in an undecoded image cell; None for an empty cell."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is not None and not isinstance(value, (str, bytes)):
        raise DataError(f"{name}: an image must be bytes or a path, got {type(value).__name__}")
    return value or None

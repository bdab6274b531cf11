"""Which columns of a `datasets` source hold the image and the captions, and how a cell becomes either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .records import DataError

IMAGE_GUESSES = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_GUESSES = ("caption", "captions", "text", "txt", "sentences", "json.captions", "json.caption")


@dataclass(frozen=True, kw_only=True)
class Columns:
    image: str
    caption: str  # may be dotted: a field inside a struct column
    caption_root: str  # the column that `caption` starts in


def choose_columns(source: str, columns: Mapping[str, Any], image: str | None, caption: str | None) -> Columns:
    """The named columns, or the only one among the usual names; `columns` maps names to feature types."""
    image = _choose(source, columns, image, IMAGE_GUESSES, kind="image")
    if _root(columns, image) != image:
        raise DataError(f"{source}: the image column cannot be a field inside a column, got {image!r}")
    caption = _choose(source, columns, caption, CAPTION_GUESSES, kind="caption")
    return Columns(image=image, caption=caption, caption_root=str(_root(columns, caption)))


def _choose(source: str, columns: Mapping[str, Any], wanted: str | None, guesses: tuple[str, ...], *, kind: str) -> str:
    listed = ", ".join(_describe(name, feature) for name, feature in columns.items())
    if wanted is not None:
        if _root(columns, wanted) is None:
            raise DataError(f"{source}: no {kind} column {wanted!r}; its columns are {listed}")
        return wanted
    found = [name for name in guesses if _root(columns, name)]
    if kind == "caption":  # a struct is not a caption: one of its fields has to be named
        found = [name for name in found if not _fields(columns.get(name))]
    if len(found) == 1:
        return found[0]
    problem = f"no {kind} column found" if not found else f"the {kind} column may be {' or '.join(found)}"
    raise DataError(f"{source}: {problem}; name it with {kind}_column; its columns are {listed}")


def _root(columns: Mapping[str, Any], name: str) -> str | None:
    """The column that a possibly dotted name starts in, or None. A column whose own name has dots wins."""
    if name in columns:
        return name
    root, _, rest = name.partition(".")
    if not rest or root not in columns:
        return None
    feature: Any = columns[root]
    for part in rest.split("."):
        feature = _fields(feature)
        if feature is None:
            return root  # type unknown (e.g. free JSON): rows will tell
        if part not in feature:
            return None
        feature = feature[part]
    return root


def _fields(feature: Any) -> Mapping[str, Any] | None:
    """Fields of a struct, or of a list of structs; an empty mapping for a plain value."""
    while isinstance(feature, (list, tuple)) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, (list, tuple)) else feature.feature
    if isinstance(feature, Mapping):
        return feature
    return None if feature is None or type(feature).__name__ == "Json" else {}


def _describe(name: str, feature: Any) -> str:
    fields = _fields(feature)
    return f"{name} (fields: {', '.join(fields)})" if fields else name


def dotted_value(row: Mapping[str, Any], path: str, root: str) -> Any:
    """The value at a dotted path; a list on the way maps over its items (`sentences.raw`)."""
    value: Any = row[root]
    for part in path[len(root) + 1 :].split(".") if path != root else []:
        if isinstance(value, (list, tuple)):
            value = [item.get(part) if isinstance(item, Mapping) else None for item in value]
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def image_value(value: Any, name: str) -> str | bytes | None:
    """What an undecoded image cell holds: encoded bytes, a path, or nothing."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is not None and not isinstance(value, (str, bytes)):
        raise DataError(f"{name}: an image must be bytes or a path, got {type(value).__name__}")
    return value or None

"""Reads JSON and YAML files that may be damaged or malicious: errors are an OSError or a ValueError, no read hangs."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

MAX_VALUES, MAX_LETTERS = 100_000, 200_000  # the most in a YAML file; to parse more takes PyYAML very long


def read_file(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        OSError: there is no such file, or it is not a regular file (reading a pipe or a device may never end).
        ValueError: it is not UTF-8 text.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(f"{path} is not a file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not UTF-8 text ({error.reason} at byte {error.start})") from error


def user_path(path: str | Path) -> Path:
    """The path with the home folder in place of `~`; `~NAME` of an unknown user stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def parse_json(text: str) -> Any:
    """`json.loads`, but a name that occurs twice in an object is an error.

    Raises:
        ValueError: the text is not valid JSON, has a name twice, or is too deep or has too long a number for Python.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):  # json would silently keep the last value.
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {duplicate!r} twice")
    return content


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read (`read_file`).
        ValueError: it is not JSON (`parse_json`).

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from loopitr.reading import read_json
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.json").write_text('{"steps": 3}')
        ...     read_json(Path(folder, "a.json"))
        {'steps': 3}
    """
    text = read_file(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read (`read_file`).
        ValueError: it is not JSON, or holds something other than an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, wanted an object")
    return content


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file of plain values.

    Raises:
        OSError: it cannot be read (`read_file`).
        ValueError: it is not YAML, constructs objects, is nested too deeply, or has aliases that are circular or expand
            to too many values.
    """
    loader = None
    try:
        text = read_file(path)
        if len(text) > MAX_LETTERS:
            raise ValueError(f"it has more than {MAX_LETTERS} letters")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)  # The one of libyaml is ten times as fast.
        node = loader.get_single_node()
        if expanded_size(node) > MAX_VALUES:
            raise ValueError(f"aliases are circular or expand to more than {MAX_VALUES} values")
        return None if node is None else loader.construct_document(node)
    except OSError:
        raise
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from error
    except Exception as error:  # PyYAML's constructors raise errors of several kinds for impossible dates and keys.
        reason = " ".join(str(error).split()).removeprefix(f"{path} is damaged: ")
        raise ValueError(f"{path} is damaged: {reason}") from error
    finally:
        if loader is not None:
            loader.dispose()


class DuplicateName(ValueError):
    """A name that occurs twice in one mapping, of which YAML would silently keep the last."""


def expanded_size(node: yaml.Node | None, *, unique: bool = False) -> float:
    """The number of values of a YAML node with its aliases expanded; infinite if they are circular.

    Args:
        unique: refuse a mapping that has a name twice.

    Raises:
        DuplicateName: a mapping has.
        RecursionError: it is nested too deeply.
    """
    return 0 if node is None else _size(node, {}, unique)


def _size(node: yaml.Node, sizes: dict[int, float], unique: bool) -> float:
    if isinstance(node, yaml.MappingNode):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)) if unique else Counter()
        for name, count in names.items():
            if count > 1 and name != "<<":
                raise DuplicateName(f"{name} occurs twice in one group")
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    else:
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        sizes[id(node)] = 1 + sum(_size(part, sizes, unique) for part in inner)
    return sizes[id(node)]

"""Annotation files of every format and damage: good rows beside a bad one, and files that are broken as a whole."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOOD = {f"{number}.png": f"a good caption, number {number}" for number in range(5)}
WORDS = " ".join(["word"] * 10_000)
HUGE = 10**400
GIVEN = ("image", "caption")  # what Karpathy's format calls otherwise
# What may stand where a text or a number is wanted; as JSON has it.
VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "zero": 0,
    "number": 7,
    "negative": -3,
    "float": 1.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "huge": HUGE,
    "64 bits and one": 2**63,
    "empty": "",
    "blank": " \t\n\u3000",
    "invisible": "\u200b\u200e\ufeff",
    "zero character": "\0",
    "control": "\x1b[31m\x07",
    "half a character": "\ud800",
    "half inside": "a \udfff b",
    "long": WORDS,
    "one long word": "x" * 100_000,
    "emoji": "\U0001f469\u200d\U0001f680",
    "right to left": "\u202eabc\u202c \u05d0\u05d1",
    "combining": "e" + "\u0301" * 500,
    "line breaks": "two\r\nlines\u2028three",
    "quotes": '"',
    "formula": '=cmd|"/c calc"!A1',
    "path": "../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "pipe": "/dev/stdin",
    "address": "http://localhost:1/x.png",
    "percent": "%s%n{0}{x}",
    "brackets": "[" * 100_000,
    "list in text": '["a", "b"]',
    "code in text": "[__import__('os').getcwd()]",
    "empty list": [],
    "list": ["one", "two"],
    "list of numbers": [1, 2],
    "list with holes": ["one", None, ""],
    "list of lists": [["one"]],
    "list of objects": [{"raw": "one"}],
    "empty object": {},
    "object": {"raw": "one"},
    "nested": {"a": {"b": [{"c": None}]}},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A file, how it is read (`karpathy`, `albef` or `table`), and whether its good rows can be read at all; None where
    the damage leaves that open."""

    name: str
    path: Path
    kind: str
    readable: bool | None


Writer = Callable[[list[dict[str, Any]]], bytes]


def _rows(field: str, value: Any) -> list[dict[str, Any]]:
    """The good rows, and in their middle one whose `field` is bad or, with `...`, missing."""
    rows = [{"image": image, "caption": caption, "split": "train"} for image, caption in GOOD.items()]
    bad = {"image": "bad.png", "caption": "a bad caption", "split": "train", field: value}
    return [*rows[:2], bad, *rows[2:]]


def _without_missing(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not ...}


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(_without_missing(row)) + "\n" for row in rows).encode()


def _csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    buffer = io.StringIO(newline="")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, columns, delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in _without_missing(row).items()}
        try:
            writer.writerow(texts)
        except csv.Error:  # "need to escape"
            continue
    return buffer.getvalue().encode(errors="surrogatepass")


def _tsv(rows: list[dict[str, Any]]) -> bytes:
    return _csv(rows, "\t")


def _albef(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps([_without_missing(row) for row in rows]).encode()


def _karpathy(rows: list[dict[str, Any]]) -> bytes:
    entries = []
    for number, row in enumerate(rows):
        sentence = _without_missing({"raw": row["caption"]})
        entry = {"filename": row["image"], "imgid": number, "sentences": [sentence], **row}
        entries.append({name: value for name, value in _without_missing(entry).items() if name not in GIVEN})
    return json.dumps({"images": entries}).encode()


WRITERS: dict[str, tuple[str, str, Writer]] = {
    "csv": ("table", "t.csv", _csv),
    "tsv": ("table", "t.tsv", _tsv),
    "jsonl": ("table", "t.jsonl", _json_lines),
    "albef": ("albef", "a.json", _albef),
    "karpathy": ("karpathy", "k.json", _karpathy),
}
FIELDS = {
    "csv": ("image", "caption", "split", "more"),
    "tsv": ("image", "caption"),
    "jsonl": ("image", "caption", "split", "more"),
    "albef": ("image", "caption", "image_id", "more"),
    "karpathy": ("filename", "sentences", "caption", "split", "filepath", "imgid", "cocoid", "more"),
}
ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-7", "shift_jis", "cp037")


def hostile_tables(folder: Path) -> Iterator[Case]:
    """Some 1,500 of them, one after the other; each is written when it is asked for, to a folder of its own."""
    for number, (name, kind, file, data, readable) in enumerate([*_of_every_value(), *_damaged(), *_malformed()]):
        path = folder / str(number) / file
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        yield Case(name=name, path=path, kind=kind, readable=readable)


Named = Iterator[tuple[str, str, str, bytes, bool | None]]


def _of_every_value() -> Named:
    for name, (kind, file, write) in WRITERS.items():
        yield f"{name} as it should be", kind, file, write(_rows("more", 1)), True
        for field in FIELDS[name]:
            yield f"{name} without {field}", kind, file, write(_rows(field, ...)), None
            for what, value in VALUES.items():
                yield f"{name} whose {field} is {what}", kind, file, write(_rows(field, value)), None


def _damaged() -> Named:
    for name, (kind, file, write) in WRITERS.items():
        data = write(_rows("caption", "caf\xe9 \u2019quoted\u2019"))
        for part in range(1, 10):
            yield f"{name} cut at {part}/10", kind, file, data[: len(data) * part // 10], None
        yield f"{name} with a mark", kind, file, b"\xef\xbb\xbf" + data, True
        yield f"{name} with old line ends", kind, file, data.replace(b"\r", b"").replace(b"\n", b"\r"), None
        text = data.decode()
        for encoding in ENCODINGS:
            yield f"{name} in {encoding}", kind, file, text.encode(encoding, errors="ignore"), None
        for place in range(0, len(data), max(1, len(data) // 12)):
            for byte in (b"\0", b"\xff", b"\x1a", b'"', b"\n"):
                broken = data[:place] + byte + data[place + 1 :]
                yield f"{name} with {byte!r} at {place}", kind, file, broken, None
        yield f"{name} of zeros", kind, file, bytes(500), False
        yield f"{name} of nothing", kind, file, b"", False
        yield f"{name} of a space", kind, file, b" ", False
        yield f"{name} that is an image", kind, file, b"\x89PNG\r\n\x1a\n" + bytes(range(256)), False
        yield f"{name} that is a page", kind, file, b"<html>404</html>", False
        yield f"{name} that is a pickle", kind, file, b"\x80\x04\x8c\x02os\x94.", False


def _malformed() -> Named:
    twice = b'{"image": "0.png", "caption": "one", "caption": "two", "split": "train"}'
    deep = b"[" * 100_000
    digits = b'{"image": "0.png", "caption": "one", "split": "train", "id": ' + b"9" * 10_000 + b"}"
    for name, item in (("a name twice", twice), ("many digits", digits)):
        yield f"jsonl with {name}", "table", "t.jsonl", item + b"\n", False
        yield f"albef with {name}", "albef", "a.json", b"[" + item + b"]", False
        inner = item.replace(b'"image"', b'"filename"').replace(b'"caption"', b'"sentences"')
        yield f"karpathy with {name}", "karpathy", "k.json", b'{"images": [' + inner + b"]}", False
    yield "jsonl of brackets", "table", "t.jsonl", deep + b"\n", False
    for kind, file in (("albef", "a.json"), ("karpathy", "k.json")):
        for content in (deep, b'{"a":' * 100_000, b"null", b"7", b'"text"', b"[]", b"{}", b"[1]", b"[null]", b"[[]]"):
            yield f"{kind} of {content[:9]!r}", kind, file, content, False
        for content in (b'{"images": {}}', b'{"images": [[]]}', b'{"images": null}', b'{"images": [{"filename": []}]}'):
            yield f"{kind} of {content!r}", kind, file, content, False
    header = b"image,caption,split\r\n"
    for name, content in {
        "a header alone": header,
        "a name twice": b"image,caption,caption,split\r\n0.png,a,b,train\r\n",
        "an open quote": header + b'0.png,"a,train\r\n',
        "a quote inside": header + b'0.png,a "b" c,train\r\n1.png,"a "b" c",train\r\n',
        "too many cells": header + b"0.png,a,train,more\r\n",
        "too few cells": header + b"0.png\r\n",
        "a large cell": header + b"0.png," + b"x" * 200_000 + b",train\r\n",
        "another delimiter": header.replace(b",", b";") + b"0.png;a;train\r\n",
        "no header": b"0.png,a,train\r\n",
        "blanks in the header": b" image , caption ,split\r\n0.png,a,train\r\n",
        "capitals in the header": b"Image,Caption,Split\r\n0.png,a,train\r\n",
    }.items():
        yield f"csv with {name}", "table", "t.csv", content, None if name == "a quote inside" else False

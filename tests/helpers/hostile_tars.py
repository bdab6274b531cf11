"""WebDataset tars of every damage, and what a reader is to make of each."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers.hostile_images import encode, picture

SAMPLES = 6  # The feature types are guessed from the first five.
Member = tuple[str | tarfile.TarInfo, bytes]


class Evidence:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]

    def pickled(self) -> bytes:
        return pickle.dumps(self)

    def saved(self) -> bytes:
        buffer = io.BytesIO()
        torch.save({"weight": self}, buffer)
        return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Case:
    """`lost`: how many of the samples are not to come; None where the whole tar is refused. `reasons`: what of them is
    counted."""

    name: str
    content: bytes
    lost: int | None = 0
    reasons: tuple[str, ...] = field(default=())


def members() -> list[Member]:
    samples = []
    for number in range(SAMPLES):
        captions = json.dumps({"captions": [f"sample {number}"]}).encode()
        samples += [(f"{number:03d}.jpg", encode(picture(number), "JPEG")), (f"{number:03d}.json", captions)]
    return samples


def tar_of(content: list[Member], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(name: str, kind: bytes, target: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def hostile_tars(evidence: Path) -> Iterator[Case]:
    """`evidence`: a file that is made where a pickle among them is loaded."""
    yield from _whole()
    yield from _cut()
    yield from _samples()
    yield from _code(evidence)


def _whole() -> Iterator[Case]:
    good = members()
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        yield Case(name=f"format {kind}", content=tar_of(good, kind))
    yield Case(
        name="long names", content=tar_of([("x" * 90 + "/" + "y" * 90 + str(name), data) for name, data in good])
    )
    yield Case(name="going up", content=tar_of([(f"../../../evil/{name}", data) for name, data in good]))
    yield Case(name="absolute", content=tar_of([(f"/tmp/evil/{name}", data) for name, data in good]))
    yield Case(name="much padding", content=tar_of(good) + bytes(100_000))
    strange = [
        link("notes", tarfile.SYMTYPE, "/etc/passwd"),
        link("pipe", tarfile.FIFOTYPE),
        link("d", tarfile.DIRTYPE),
    ]
    yield Case(name="with strangers", content=tar_of([*strange, *good, ("README", b"text"), (".hidden", b"")]))


def _cut() -> Iterator[Case]:
    whole = tar_of(members())
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [(info.offset, info.offset_data, info.size) for info in tar]
    start, data, size = headers[6]  # of the fourth sample
    end = headers[-1][1] + 512
    cut = ("tar file without its end, samples may be missing",)
    broken = ("tar file broken in its middle, the samples after that are missing",)
    yield Case(name="cut between members", content=whole[:start], lost=3, reasons=cut)
    yield Case(name="cut in a header", content=whole[: start + 200], lost=3, reasons=cut)
    yield Case(name="cut in data", content=whole[: data + 100], lost=None)
    yield Case(name="cut in padding", content=whole[: data + size], lost=None)
    yield Case(name="without an end", content=whole[:end], reasons=cut)
    yield Case(name="one zero block for an end", content=whole[: end + 512])
    yield Case(
        name="a broken header", content=whole[:start] + b"\xff" * 512 + whole[start + 512 :], lost=3, reasons=broken
    )
    yield Case(name="zeros inside", content=whole[:start] + bytes(1024) + whole[start + 1024 :], lost=3, reasons=broken)
    yield Case(name="two in one file", content=whole + whole, reasons=broken)
    negative = bytearray(whole[start : start + 512])
    negative[124:136] = b"-0000001000\0"
    negative[148:156] = b" " * 8
    negative[148:156] = f"{sum(negative):06o}\0 ".encode()
    yield Case(name="a negative size", content=whole[:start] + negative + whole[start + 512 :], lost=None)
    for name, content in {
        "nothing": b"",
        "text": b"hello" * 1000,
        "zeros": bytes(10_240),
        "gzip": b"\x1f\x8b" * 99,
    }.items():
        yield Case(name=name, content=content, lost=None)


def _samples() -> Iterator[Case]:
    good = members()
    yield Case(name="without captions", content=tar_of(good[:-1]), lost=1, reasons=("no captions",))
    yield Case(name="without an image", content=tar_of([*good[:-2], good[-1]]), lost=1, reasons=("no image",))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        instead = link("005.jpg", kind, "/etc/passwd")
        yield Case(
            name=f"type {kind!r}", content=tar_of([*good[:-2], instead, good[-1]]), lost=1, reasons=("no image",)
        )
        early = [*good[:4], link("002.jpg", kind, "../../etc/passwd"), *good[5:]]
        yield Case(name=f"type {kind!r} early", content=tar_of(early), lost=None)
    yield Case(name="twice", content=tar_of([*good[:2], *good]), lost=None)
    yield Case(name="out of order", content=tar_of([good[0], good[2], good[1], *good[3:]]), lost=None)
    yield Case(name="bad gzip", content=tar_of([*good[:-2], ("005.jpg.gz", b"\x1f\x8bxx"), good[-1]]), lost=None)
    for name, text, reason in (
        ("blank", b'{"captions": [" "]}', ("empty caption", "no captions")),
        ("none", b'{"captions": null}', ("no captions",)),
        ("other", b'{"other": "a"}', ("no captions",)),
        ("long", json.dumps({"captions": ["word " * 10_000]}).encode(), ()),
    ):
        content = tar_of([*good[:-1], ("005.json", text)])
        yield Case(name=f"captions {name}", content=content, lost=len(reason) and 1, reasons=reason)
    for name, text in (
        ("broken", b"{"),
        ("number", b'{"captions": 5}'),
        ("latin", '{"captions": "\xe9"}'.encode("latin-1")),
        ("half", b'{"captions": ["\\ud800"]}'),
        ("digits", b'{"captions": ["a"], "n": ' + b"9" * 5000 + b"}"),
        ("deep", b"[" * 100_000),
    ):
        yield Case(name=f"captions {name}", content=tar_of([*good[:-1], ("005.json", text)]), lost=None)


def _code(evidence: Path) -> Iterator[Case]:
    harmful = Evidence(evidence)
    for ending in ("pyd", "pickle", "pkl", "pth", "npy", "npz", "bin"):
        for data in (harmful.pickled(), harmful.saved()):
            content: list[Member] = []
            for position, member in enumerate(members()):
                content += [member] if position % 2 == 0 else [member, (f"{position // 2:03d}.{ending}", data)]
            # These are decoded, in a way that runs nothing; an archive of arrays is not even looked into.
            refused = ending in ("pth", "npy") or (ending == "npz" and data == harmful.pickled())
            yield Case(name=f"{ending} of {data[:2]!r}", content=tar_of(content), lost=None if refused else 0)

"""A short description of a run's records, by which it shows later that a table or an image has changed since."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loopitr.reading import read_json

from .hub_stream import HubStream
from .image_sizes import file_size, image_sizes
from .records import LazyRecords, Record, caption_count, captions_of, name_of
from .scenes import SceneRecords

SAMPLED = 2000  # Of lazy records, so many have their captions read, spread evenly.


class DescribedData:
    """The records of a run's splits, described when the description is first needed.

    Example:
        >>> from loopitr.data import SceneRecords
        >>> from loopitr.data.description import DescribedData
        >>> DescribedData(val=SceneRecords("val", 8)).content["val"]["captions"]
        32
    """

    def __init__(self, **records: Sequence[Record] | HubStream) -> None:
        self.records = records
        self.start: str | None = None  # the stamp of the run that this one starts from (`lineage.stamp`)

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of `data.json`: a description of each split."""
        described = {split: describe_records(records) for split, records in self.records.items()}
        return described if self.start is None else {**described, "start": self.start}

    def changes_since(self, path: Path) -> list[str]:
        """`train data: old -> new`, and the same for other splits, where they differ from the file, if it exists."""
        try:
            old = read_json(path)
            changes = {split: difference(old[split], self.content[split], of) for split, of in self.records.items()}
        except (OSError, ValueError, LookupError, TypeError):
            return []
        return [f"{split} data: {change}" for split, change in changes.items() if change is not None]


def describe_records(records: Sequence[Record] | HubStream) -> dict[str, Any] | None:
    """The number of images and captions, digests of names and captions, and the sizes of the images' files in bytes.

    Of the digests, `rows` does not depend on the order of the records, and `order` does. No image is read. The names of
    lazy records are left out, since they may depend on where the data are. A stream is described by its local files
    alone; None: it has none.

    Example:
        >>> from loopitr.data.description import describe_records
        >>> from loopitr.data import Record
        >>> cards = [Record(image=f"{colour}.jpg", captions=(f"a {colour} card",)) for colour in ("red", "blue")]
        >>> describe_records(cards)["captions"], describe_records(cards) == describe_records(cards[::-1])
        (2, False)
    """
    if isinstance(records, HubStream):
        return _described_files(records.files)
    lazy, count = isinstance(records, LazyRecords), len(records)
    step = max(1, count // SAMPLED) if lazy and not isinstance(records, SceneRecords) else 1
    rows, order = 0, hashlib.blake2b(digest_size=16)
    for index in range(0, count, step):
        row = _digest(*(() if lazy else (name_of(records, index),)), *captions_of(records, index))
        rows = (rows + int.from_bytes(row, "big")) % 2**128
        order.update(row)
    captions = sum(caption_count(records, index) for index in range(count))
    described = {"images": count, "captions": captions, "rows": f"{rows:032x}", "order": order.hexdigest()}
    sizes = image_sizes(records)
    return described if sizes is None else {**described, "sizes": _packed(sizes)}


def difference(old: Any, new: Any, records: Sequence[Record] | HubStream, *, in_order: bool = True) -> str | None:
    """How two descriptions differ, in words; None: they do not, or one is missing or damaged.

    Args:
        records: what `new` describes, for the names of images.
        in_order: whether another order is a difference.
    """
    if not isinstance(old, dict) or not isinstance(new, dict):
        return None
    if isinstance(records, HubStream):
        names: tuple[str, ...] = ("files", "bytes", "rows")
        kinds = names[:2]
    else:
        names, kinds = ("images", "captions", "rows", *(("order",) if in_order else ())), ("images", "captions")
    if any(old.get(name) != new.get(name) for name in names):
        before, after = (" and ".join(f"{side.get(kind)} {kind}" for kind in kinds) for side in (old, new))
        how = "in another order" if old.get("rows") == new.get("rows") else "with other names or texts"
        if kinds[0] == "files":
            how = "with other names or sizes"
        return f"{before} -> {f'the same number, {how}' if before == after else after}"
    return None if isinstance(records, HubStream) else _changed_images(old, new, records)


def _changed_images(old: dict[str, Any], new: dict[str, Any], records: Sequence[Record]) -> str | None:
    """How many images have another size than before, and the first of them; None: none, or the sizes are unknown."""
    before, after = (_unpacked(side.get("sizes"), len(records)) for side in (old, new))
    if before is None or after is None:
        return None
    if old.get("order") != new.get("order"):  # The images cannot be told apart, but their sizes can be counted.
        count, first = (Counter(after.tolist()) - Counter(before.tolist())).total(), ""
    else:
        places = np.flatnonzero(before != after)
        count = len(places)
        first = f", the first is {name_of(records, int(places[0]))}" if count else ""
    return f"{count} of {len(records)} images are other files (of another size in bytes){first}" if count else None


def _described_files(paths: Sequence[str]) -> dict[str, Any] | None:
    if not paths:
        return None
    sizes = [file_size(path) for path in paths]
    rows = sum(int.from_bytes(_digest(os.path.basename(p), str(size)), "big") for p, size in zip(paths, sizes))
    return {"files": len(paths), "bytes": sum(sizes), "rows": f"{rows % 2**128:032x}"}


def _digest(*texts: str) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode(errors="surrogatepass"), digest_size=16).digest()


def _packed(sizes: np.ndarray) -> str:
    """Sizes as text for JSON: one text of four characters or so per image, where a list would be twice as long."""
    return base64.b64encode(zlib.compress(sizes.astype("<i8").tobytes())).decode()


def _unpacked(text: Any, count: int) -> np.ndarray | None:
    """The sizes in a text of `_packed`; None if it is missing, damaged, or not of `count` images."""
    try:
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 8 * count + 1)
    except (TypeError, ValueError, binascii.Error, zlib.error):
        return None
    return np.frombuffer(content, "<i8") if len(content) == 8 * count else None

"""A short description of records, by which it shows later that a file has changed since a run was trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from .hub_stream import HubStream
from .records import LazyRecords, Record, caption_count, captions_of, name_of
from .scenes import SceneRecords

DESCRIPTION = "data.json"  # the file in a run folder
SAMPLED = 2000  # Of lazy records, so many have their captions read, spread evenly.


def describe_records(records: Sequence[Record] | HubStream) -> dict[str, Any] | None:
    """The number of images and captions, and digests of names and captions; None for a stream.

    Of the digests, `rows` does not depend on the order of the records, and `order` does. No image is read. The names of
    lazy records are left out, since they may depend on where the data are.

    Example:
        >>> from loopitr.data.description import describe_records
        >>> from loopitr.data import Record
        >>> cards = [Record(image=f"{colour}.jpg", captions=(f"a {colour} card",)) for colour in ("red", "blue")]
        >>> describe_records(cards)["captions"], describe_records(cards) == describe_records(cards[::-1])
        (2, False)
    """
    if isinstance(records, HubStream):
        return None
    lazy, count = isinstance(records, LazyRecords), len(records)
    step = max(1, count // SAMPLED) if lazy and not isinstance(records, SceneRecords) else 1
    rows, order = 0, hashlib.blake2b(digest_size=16)
    for index in range(0, count, step):
        texts = (*(() if lazy else (name_of(records, index),)), *captions_of(records, index))
        row = hashlib.blake2b("\0".join(texts).encode(errors="surrogatepass"), digest_size=16).digest()
        rows = (rows + int.from_bytes(row, "big")) % 2**128
        order.update(row)
    captions = sum(caption_count(records, index) for index in range(count))
    return {"images": count, "captions": captions, "rows": f"{rows:032x}", "order": order.hexdigest()}


def difference(old: Any, new: Any, *, in_order: bool = True) -> str | None:
    """How two descriptions differ, in words; None: they do not, or one is missing or damaged.

    Args:
        in_order: whether another order is a difference.
    """
    names = ("images", "captions", "rows", *(("order",) if in_order else ()))
    if not isinstance(old, dict) or not isinstance(new, dict) or all(old.get(n) == new.get(n) for n in names):
        return None
    before, after = (f"{side.get('images')} images and {side.get('captions')} captions" for side in (old, new))
    how = "in another order" if old.get("rows") == new.get("rows") else "with other names or texts"
    return f"{before} -> {f'the same number, {how}' if before == after else after}"

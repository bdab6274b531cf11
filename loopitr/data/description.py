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
    """The number of images and captions, and a digest of names and captions in order; None for a stream.

    No image is read. Lazy records are without their names, which may depend on where the data are.

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
    digest = hashlib.blake2b(digest_size=16)
    for index in range(0, count, step):
        for text in (*(() if lazy else (name_of(records, index),)), *captions_of(records, index)):
            digest.update(text.encode(errors="surrogatepass") + b"\0")
        digest.update(b"\1")
    captions = sum(caption_count(records, index) for index in range(count))
    return {"images": count, "captions": captions, "digest": digest.hexdigest()}


def difference(old: Any, new: Any) -> str | None:
    """How two descriptions differ, in words; None: they do not, or one is missing or damaged."""
    if not isinstance(old, dict) or not isinstance(new, dict) or old == new:
        return None
    before, after = (f"{side.get('images')} images and {side.get('captions')} captions" for side in (old, new))
    return f"{before} -> {f'{after} that differ in name, text or order' if before == after else after}"

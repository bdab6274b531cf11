"""Warnings about the records of a run: held-out images that are (or may be) trained on, too few validation images."""

from __future__ import annotations

from collections.abc import Sequence

from loopitr.data import HubStream, LazyRecords, Record, SceneRecords, shared_images
from loopitr.data.overlap import listed

FEW = 100  # With fewer images, one query more or less changes R@1 by over a point.
MOST_READ = 50_000  # With more lazy records, reading every image to compare its size would take too long.


def record_warnings(
    train: Sequence[Record] | HubStream, held_out: dict[str, Sequence[Record]], *, chooses: str, max_images: int | None
) -> list[str]:
    """Warnings about held-out images that are trained on, and about too few images to choose the best model by.

    Args:
        held_out: records by the name of their split.
        chooses: the split that chooses the best model, by its first `max_images` images.
    """
    lines = []
    reason = _not_compared(train)
    if reason is not None:
        lines.append(f"held-out images are not looked for among the training images, {reason}")
    for split, records in held_out.items():
        shared = [] if reason is not None or isinstance(train, HubStream) else shared_images(records, train)
        if shared:
            names = listed(f"{image.name} ({image.other})" for image in shared)
            lines.append(f"warning: {len(shared)} of the {len(records)} {split} images are trained on too: {names}")
    number = min(len(held_out[chooses]), max_images or len(held_out[chooses]))
    if number < FEW:
        lines.append(
            f"warning: {number} {chooses} images choose the best model, and one of them is {100 / number:.1f} points "
            "of R@1; hold out more"
        )
    return lines


def _not_compared(train: Sequence[Record] | HubStream) -> str | None:
    """Why training images are not compared with others; None: they are."""
    if isinstance(train, HubStream):
        return "which are a stream"
    if isinstance(train, LazyRecords) and not isinstance(train, SceneRecords) and len(train) > MOST_READ:
        return f"which are over {MOST_READ:,} and would all have to be read"
    return None

"""What a run says about its records before it trains: images of the training set in others, few to choose by."""

from __future__ import annotations

from collections.abc import Sequence

from loopitr.data import HubStream, LazyRecords, Record, SceneRecords, shared_images
from loopitr.data.overlap import listed

FEW = 100  # images; below it, one query more or less is over a point of R@1
MOST_READ = 50_000  # lazy records: an image has to be read before its size is known


def record_warnings(
    train: Sequence[Record] | HubStream, held_out: dict[str, Sequence[Record]], *, chooses: str, max_images: int | None
) -> list[str]:
    """Lines that warn of held-out images that are trained on, and of too few that choose the best model.

    Args:
        held_out: records by the name of their split; `chooses` is the one that chooses the best model, by its first
            `max_images`.
    """
    lines = []
    for split, records in held_out.items():
        if isinstance(train, HubStream) or not _is_cheap(train):
            continue
        shared = shared_images(records, train)
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


def _is_cheap(records: Sequence[Record]) -> bool:
    return not isinstance(records, LazyRecords) or isinstance(records, SceneRecords) or len(records) <= MOST_READ

"""The gallery of an evaluation: the images and captions of its records, and which of them belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopitr.data import DataError, LoadReport, Record, captions_of, identity_of, image_key_of, name_of
from loopitr.models.processing import LoopITRProcessor

from .pixels import Transform, transform_of


def evaluation_transform(processor: LoopITRProcessor) -> Transform:
    """A function RGB PIL image -> `[3, S, S]` that applies the processor; it can be sent to DataLoader workers."""
    return transform_of(processor.image_processor)


@dataclass(frozen=True)
class Gallery:
    """I images and their T captions.

    Attributes:
        positions: the positions of the images in the records; of an image with several records, that of the first.
        captions: the captions; those of an image are consecutive.
        caption_rows: `[T]`, the image that each caption belongs to, from 0 to I - 1.
        image_identities, text_identities: `[I]` and `[T]`; equal identities are right answers.
    """

    positions: list[int]
    captions: list[str]
    caption_rows: Tensor
    image_identities: Tensor
    text_identities: Tensor


def distinct_images(records: Sequence[Record], count: int) -> list[list[int]]:
    """The positions of each image in the first `count` records, in the order in which the images appear.

    Where each caption of an image is a row of its own, the image would otherwise be a candidate several times: a wrong
    image that is ahead would push the right one down by five ranks, and fill the list to rerank with its copies.
    """
    identities = [identity_of(records, position) for position in range(count)]
    times = Counter(identities)
    images: dict[Hashable, list[int]] = {}
    for position, identity in enumerate(identities):
        # Records of one identity may also show different images. A key is made only where it decides.
        key = image_key_of(records, position) if times[identity] > 1 else None
        images.setdefault((identity, key), []).append(position)
    return list(images.values())


def build_gallery(
    records: Sequence[Record], images: Sequence[Sequence[int]], report: LoadReport, *, captions_per_image: int | None
) -> Gallery:
    """The gallery of some of the `distinct_images`; blank captions, and images without captions, are skipped."""
    used: list[int] = []
    captions: list[str] = []
    image_identities: list[int] = []
    text_identities: list[int] = []
    caption_rows: list[int] = []
    for positions in images:
        position = positions[0]
        all_captions = [caption for each in positions for caption in captions_of(records, each)]
        own_captions = [caption for caption in all_captions if caption.strip()]
        for _ in range(len(all_captions) - len(own_captions)):
            report.skip("empty caption", name_of(records, position))
        if not own_captions:
            report.skip("no captions", name_of(records, position))
            continue
        own_captions = own_captions[:captions_per_image]
        caption_rows += [len(used)] * len(own_captions)
        used.append(position)
        image_identities.append(identity_of(records, position))
        captions += own_captions
        text_identities += [image_identities[-1]] * len(own_captions)
    return Gallery(
        positions=used,
        captions=captions,
        caption_rows=torch.tensor(caption_rows, dtype=torch.int64),
        image_identities=torch.tensor(image_identities),
        text_identities=torch.tensor(text_identities),
    )


def account(skipped: LoadReport, report: LoadReport | None, gallery: Gallery, count: int, allowed: float) -> None:
    """Add what was skipped to `report`, and check that enough of `count` distinct images is left.

    Raises:
        DataError: nothing is left, or more than the fraction `allowed` was skipped.
    """
    skipped.images, skipped.captions = len(gallery.positions), len(gallery.captions)
    if report is not None:
        report.merge_skips(skipped)
    if not gallery.positions:
        raise DataError(f"nothing to evaluate on: {count} images gave {skipped.summary()}")
    lost = count - len(gallery.positions)
    if not lost <= allowed * count:
        limit = f"more than the allowed fraction {allowed}"
        raise DataError(f"{lost} of {count} images cannot be used, {limit}: {skipped.summary()}")

"""Index arithmetic of packed sequences: which rows of a flat token table belong together, without padding.

Pairs are sorted by image and their text tokens laid end to end, so every linear layer sees real tokens only. Attention
needs rectangles: `segments` cuts them out of the flat table, in a few buckets of similar length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BUCKETS = 4
SMALL = 16  # fewer segments than this are not worth a second attention call


@dataclass(frozen=True)
class Bucket:
    """`members [n]`: which segments; `rows [n, M]`: their rows, padded; `mask [n, M]`: real ones, None if all are."""

    members: Tensor
    rows: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Segments:
    """Consecutive runs of rows in a flat table, in buckets; `order` brings the buckets' rows back to the table's."""

    buckets: list[Bucket]
    order: Tensor | None

    def scatter(self, outputs: list[Tensor]) -> Tensor:
        """Undo the cut: one `[n, M, ...]` per bucket -> `[rows, ...]`."""
        parts = [o.flatten(0, 1) if b.mask is None else o[b.mask] for o, b in zip(outputs, self.buckets, strict=True)]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        return flat if self.order is None else flat.index_select(0, self.order)


def segments(lengths: Tensor) -> Segments:
    """`lengths [S]` (int64, on the CPU, all >= 1) of consecutive segments -> their buckets.

    Segments are sorted by length and cut where the padding saved is largest, into at most `MAX_BUCKETS`.
    """
    starts = torch.cumsum(lengths, 0) - lengths
    by_length = torch.argsort(lengths, stable=True)
    buckets = []
    for members in _cut(by_length, lengths):
        own = lengths[members]
        longest = int(own.max())
        offset = torch.arange(longest)
        mask = offset < own.unsqueeze(1)  # [n, M]
        rows = starts[members].unsqueeze(1) + torch.minimum(offset, own.unsqueeze(1) - 1)  # [n, M]
        buckets.append(Bucket(members, rows, None if bool(mask.all()) else mask))
    flat = torch.cat([b.rows.flatten() if b.mask is None else b.rows[b.mask] for b in buckets])
    in_order = bool((flat[1:] > flat[:-1]).all())
    return Segments(buckets, None if in_order else torch.argsort(flat))


def _cut(by_length: Tensor, lengths: Tensor) -> list[Tensor]:
    """Greedy cuts of the sorted segments, each where it saves most padding."""
    ordered, count = lengths[by_length], len(lengths)
    if count < SMALL or ordered[0] == ordered[-1]:
        return [torch.arange(count)]  # one bucket stays in the table's order: nothing to select, nothing to undo
    cuts = [0, count]
    while len(cuts) <= MAX_BUCKETS:
        best, best_saving = -1, 0
        for low, high in zip(cuts[:-1], cuts[1:], strict=True):
            # Cutting after position m shortens low..m from the longest of the run to ordered[m].
            sizes = torch.arange(1, high - low)
            saving = sizes * (ordered[high - 1] - ordered[low : high - 1])
            if len(saving) and int(saving.max()) > best_saving:
                best, best_saving = low + int(saving.argmax()) + 1, int(saving.max())
        if best < 0:
            break
        cuts = sorted([*cuts, best])
    return [by_length[low:high] for low, high in zip(cuts[:-1], cuts[1:], strict=True)]


def move(item: Segments, device: torch.device) -> Segments:
    """The same segments with their indices on `device`."""
    if device.type == "cpu":
        return item
    buckets = [
        Bucket(b.members.to(device), b.rows.to(device), None if b.mask is None else b.mask.to(device))
        for b in item.buckets
    ]
    return Segments(buckets, None if item.order is None else item.order.to(device))


@dataclass(frozen=True)
class PairLayout:
    """Where every token of every pair lies. Pairs are unique and sorted by (image, text).

    `source [R]` row of the packed text table behind each row; `firsts [P]` rows of the pairs' first tokens;
    `texts` segments by pair; `images` segments by image, over all rows; `image_firsts` likewise over first tokens;
    `used [I]` the image each segment stands for.
    """

    source: Tensor
    firsts: Tensor
    texts: Segments
    images: Segments
    image_firsts: Segments
    used: Tensor


def lay_out(pairs: Tensor, lengths: Tensor, device: torch.device) -> PairLayout:
    """`pairs [P, 2]` unique, sorted by image, and text `lengths [T]`, both on the CPU -> their layout on `device`."""
    text_starts = torch.cumsum(lengths, 0) - lengths
    per_pair = lengths[pairs[:, 1]]  # [P]
    starts = torch.cumsum(per_pair, 0) - per_pair
    total = int(per_pair.sum())
    owner = torch.repeat_interleave(torch.arange(len(pairs)), per_pair)  # [R]
    source = text_starts[pairs[owner, 1]] + torch.arange(total) - starts[owner]
    used, image_of_pair, count = torch.unique_consecutive(pairs[:, 0], return_inverse=True, return_counts=True)
    per_image = torch.zeros(len(used), dtype=torch.int64).index_add_(0, image_of_pair, per_pair)
    return PairLayout(
        source=source.to(device),
        firsts=starts.to(device),
        texts=move(segments(per_pair), device),
        images=move(segments(per_image), device),
        image_firsts=move(segments(count), device),
        used=used.to(device),
    )

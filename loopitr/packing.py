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
    """Consecutive runs of rows in a flat table, in buckets.

    `back [rows]`: where each row of the table lies in the buckets' padded rows, end to end. None: one bucket that is
    the table itself, in order and without padding.
    """

    buckets: list[Bucket]
    back: Tensor | None

    def cut(self, table: Tensor) -> list[Tensor]:
        """`[rows, ...]` -> one `[n, M, ...]` per bucket; what stands in the padding is some row of the segment."""
        if self.back is None:
            return [table.unflatten(0, self.buckets[0].rows.shape)]
        return [table[bucket.rows] for bucket in self.buckets]

    def scatter(self, outputs: list[Tensor]) -> Tensor:
        """Undo the cut: one `[n, M, ...]` per bucket -> `[rows, ...]`."""
        parts = [output.flatten(0, 1) for output in outputs]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        return flat if self.back is None else flat.index_select(0, self.back)


def segments(lengths: Tensor, *, fixed: bool = False) -> Segments:
    """`lengths [S]` (int64, on the CPU, all >= 1) of consecutive segments -> their buckets.

    Segments are sorted by length and cut where the padding saved is largest, into at most `MAX_BUCKETS`.

    Args:
        fixed: one bucket with a mask, whatever the lengths: torch.compile then meets one structure, of changing sizes.
    """
    starts = torch.cumsum(lengths, 0) - lengths
    buckets, places, before = [], [], 0
    for members in [torch.arange(len(lengths))] if fixed else _cut(lengths):
        own = lengths[members]
        longest = int(own.max())
        offset = torch.arange(longest)
        mask = offset < own.unsqueeze(1)  # [n, M]
        rows = starts[members].unsqueeze(1) + torch.minimum(offset, own.unsqueeze(1) - 1)  # [n, M]
        buckets.append(Bucket(members, rows, mask if fixed or not bool(mask.all()) else None))
        places.append((rows[mask], before + mask.flatten().nonzero().squeeze(1)))
        before += rows.numel()
    if len(buckets) == 1 and buckets[0].mask is None:
        return Segments(buckets, None)
    back = torch.empty(int(lengths.sum()), dtype=torch.int64)
    for rows, place in places:
        back[rows] = place
    return Segments(buckets, back)


def _cut(lengths: Tensor) -> list[Tensor]:
    """Greedy cuts of the segments sorted by length, each where it saves most padding."""
    count = len(lengths)
    if count < SMALL or int(lengths.min()) == int(lengths.max()):
        return [torch.arange(count)]  # one bucket stays in the table's order: nothing to select
    by_length = torch.argsort(lengths, stable=True)
    ordered, cuts = lengths[by_length], [0, count]
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
    return Segments(buckets, None if item.back is None else item.back.to(device))


@dataclass(frozen=True)
class PairLayout:
    """Where every token of every pair lies. Pairs are unique and sorted by (image, text).

    `source [R]` row of the packed text table behind each row; `firsts [P]` rows of the pairs' first tokens;
    `alone` segments of the text table; `texts` segments by pair; `images` segments by image, over all rows;
    `image_firsts` likewise over first tokens.
    """

    source: Tensor
    firsts: Tensor
    alone: Segments
    texts: Segments
    images: Segments
    image_firsts: Segments


def lay_out(pairs: Tensor, lengths: Tensor, device: torch.device, *, fixed: bool = False) -> PairLayout:
    """The layout, on `device`, of `pairs [P, 2]` (unique, sorted by image) of texts of `lengths [T]`, both on the CPU.

    Args:
        fixed: as in `segments`.
    """
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
        alone=move(segments(lengths, fixed=fixed), device),
        texts=move(segments(per_pair, fixed=fixed), device),
        images=move(segments(per_image, fixed=fixed), device),
        image_firsts=move(segments(count, fixed=fixed), device),
    )


def image_blocks(pairs: Tensor, size: int) -> list[Tensor]:
    """Cut sorted `pairs [P, 2]` into blocks of at most `size`, between images wherever an image has no more pairs."""
    _, counts = torch.unique_consecutive(pairs[:, 0], return_counts=True)
    sizes, filled = [], 0
    for count in counts.tolist():
        if filled and filled + count > size:
            sizes.append(filled)
            filled = 0
        filled += count
        while filled > size:
            sizes.append(size)
            filled -= size
    return list(pairs.split([*sizes, filled] if filled else sizes))

"""Index arithmetic of packed sequences: which rows of a flat token table belong together, without padding.

Pairs are sorted by image and their text tokens laid end to end, so every linear layer sees real tokens only. Attention
needs rectangles: `segments` cuts them out of the flat table, in a few buckets of similar length.

An example of two images and three captions of 2, 3 and 1 tokens, as `lay_out` lays it out:

    padded captions [3 * 3]      pairs (image, text), sorted
      a0 a1  .   = 0 1 2           (0, a)  (0, b)  (1, b)  (1, c)
      b0 b1 b2   = 3 4 5
      c0  .  .   = 6 7 8

    packed captions              a0 a1  b0 b1 b2  c0           `tokens`: 0 1  3 4 5  6
                                  0  1   2  3  4   5

    packed rows of the pairs     a0 a1  b0 b1 b2  b0 b1 b2  c0
      row                         0  1   2  3  4   5  6  7   8
      `source`                    0  1   2  3  4   2  3  4   5
      `firsts`                    0      2         5         8
      `images`                   |--- image 0 ---|-- image 1 --|  segments of 5 and 4 rows: one query each

    `texts`: segments of 2, 3, 3 and 1 rows. So few stay in one bucket, which is padded with their last rows:
      rows   0 1 1    mask   1 1 0
             2 3 4           1 1 1
             5 6 7           1 1 1
             8 8 8           1 0 0
    From `SMALL` segments on they would be cut where most padding is saved. Of these lengths the buckets would be
      8  |  0 1  |  2 3 4      and nothing is padded.
                    5 6 7
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

MAX_BUCKETS = 4
# Fewer segments than this are not worth a second attention call.
SMALL = 16


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
    the table itself, in order and without padding. `order [S]`: where each segment lies among the buckets' members, end
    to end. `whole`: one bucket of all segments, in order.
    """

    buckets: list[Bucket]
    back: Tensor | None
    order: Tensor
    whole: bool

    def cut(self, table: Tensor, bucket: Bucket) -> Tensor:
        """A bucket's rows of the table, `[rows, ...]` -> `[n, M, ...]`; padding holds some row of the segment."""
        return table.unflatten(0, bucket.rows.shape) if self.back is None else table[bucket.rows]

    def pick(self, items: Tensor, bucket: Bucket) -> Tensor:
        """Of one item per segment `[S, ...]`, those of a bucket `[n, ...]`."""
        return items if self.whole else items.index_select(0, bucket.members)

    def unpick(self, outputs: list[Tensor]) -> Tensor:
        """Undo the pick: one `[n, ...]` per bucket -> `[S, ...]`."""
        return outputs[0] if self.whole else torch.cat(outputs).index_select(0, self.order)

    def scatter(self, outputs: list[Tensor]) -> Tensor:
        """Undo the cut: one `[n, M, ...]` per bucket -> `[rows, ...]`."""
        parts = [output.flatten(0, 1) for output in outputs]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        return flat if self.back is None else flat.index_select(0, self.back)

    def tensors(self) -> list[Tensor]:
        """All indices and masks."""
        every = [x for bucket in self.buckets for x in (bucket.members, bucket.rows, bucket.mask)]
        return [x for x in (*every, self.back, self.order) if x is not None]

    def replaced(self, tensors: Iterator[Tensor]) -> Segments:
        """The same with other `tensors`, in the order of `tensors()`."""
        buckets = [
            Bucket(next(tensors), next(tensors), None if bucket.mask is None else next(tensors))
            for bucket in self.buckets
        ]
        return Segments(buckets, None if self.back is None else next(tensors), next(tensors), self.whole)

    def among(self, rows: Tensor) -> Segments:
        """For `pick` from a table that holds more: segment s has its row `rows[s]`."""
        buckets = [replace(bucket, members=rows[bucket.members]) for bucket in self.buckets]
        return replace(self, buckets=buckets, whole=False)


def segments(lengths: Tensor, *, fixed: bool = False) -> Segments:
    """`lengths [S]` (int64, on the CPU, all >= 1) of consecutive segments -> their buckets.

    Segments are sorted by length and cut where the padding saved is largest, into at most `MAX_BUCKETS`.

    Args:
        fixed: always `MAX_BUCKETS` buckets with masks, of two segments and two rows at least: torch.compile then meets
            one structure, of changing sizes (it takes a size of 1 for a constant). Some segments are in it twice.
    """
    starts = torch.cumsum(lengths, 0) - lengths
    parts, least = _cut(lengths), 1
    if fixed:
        parts, least = [*parts, *[lengths.argmin()[None]] * (MAX_BUCKETS - len(parts))], 2
    buckets, places, before = [], [], 0
    for members in parts:
        members = members.repeat(-(-least // len(members)))
        own = lengths[members]
        offset = torch.arange(max(least, int(own.max())))
        mask = offset < own.unsqueeze(1)  # [n, M]
        rows = starts[members].unsqueeze(1) + torch.minimum(offset, own.unsqueeze(1) - 1)  # [n, M]
        buckets.append(Bucket(members, rows, mask if fixed or not bool(mask.all()) else None))
        places.append((rows[mask], before + mask.flatten().nonzero().squeeze(1)))
        before += rows.numel()
    members = torch.cat([bucket.members for bucket in buckets])
    order = torch.empty_like(lengths)
    order[members] = torch.arange(len(members))
    if len(buckets) == 1 and buckets[0].mask is None:
        return Segments(buckets, None, order, True)
    back = torch.empty(int(lengths.sum()), dtype=torch.int64)
    for rows, place in places:
        back[rows] = place
    return Segments(buckets, back, order, len(buckets) == 1)


def _cut(lengths: Tensor) -> list[Tensor]:
    """Greedy cuts of the segments sorted by length, each where it saves most padding."""
    count = len(lengths)
    if count < SMALL or int(lengths.min()) == int(lengths.max()):
        return [torch.arange(count)]  # One bucket stays in the table's order, so that nothing is selected.
    by_length = torch.argsort(lengths, stable=True)
    ordered, cuts = lengths[by_length], [0, count]
    while len(cuts) <= MAX_BUCKETS:
        best, best_saving = -1, 0
        for low, high in pairwise(cuts):
            # Cutting after position m shortens low..m from the longest of the run to ordered[m].
            sizes = torch.arange(1, high - low)
            saving = sizes * (ordered[high - 1] - ordered[low : high - 1])
            if len(saving) and int(saving.max()) > best_saving:
                best, best_saving = low + int(saving.argmax()) + 1, int(saving.max())
        if best < 0:
            break
        cuts = sorted([*cuts, best])
    return [by_length[low:high] for low, high in pairwise(cuts)]


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`tensors` of the CPU on `device`, in one copy that does not wait for what a GPU has yet to do."""
    if device.type == "cpu":
        return list(tensors)
    # Types of larger items come first, so that every type stays aligned.
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index].itemsize)
    parts = [tensors[index].contiguous().flatten().view(torch.uint8) for index in order]
    flat = torch.cat(parts) if len(parts) > 1 else parts[0]
    if device.type == "cuda":
        flat = flat.pin_memory()
    pieces = flat.to(device, non_blocking=True).split([tensors[index].nbytes for index in order])
    copies = dict(zip(order, pieces, strict=True))
    return [copies[index].view(tensor.dtype).view(tensor.shape) for index, tensor in enumerate(tensors)]


@dataclass(frozen=True)
class PackedTexts:
    """Texts without padding: `tokens [R]` what their table takes from the padded one `[T * L]`; their `segments`."""

    tokens: Tensor
    segments: Segments

    def to(self, device: torch.device) -> PackedTexts:
        """The same with its indices on `device`."""
        tokens, *rest = send([self.tokens, *self.segments.tensors()], device)
        return PackedTexts(tokens, self.segments.replaced(iter(rest)))


def pack_texts(mask: Tensor) -> PackedTexts:
    """All texts of real tokens `mask [T, L]`, on the CPU.

    Raises:
        ValueError: a text has no token.
    """
    mask = mask.bool()
    return PackedTexts(mask.flatten().nonzero().squeeze(1), segments(_lengths(mask, torch.arange(len(mask)))))


def _lengths(real: Tensor, numbers: Tensor) -> Tensor:
    """`[t]` tokens of each text of `real [t, L]`; `numbers [t]` are what an error calls them."""
    lengths = real.sum(1)
    if len(lengths) and int(lengths.min()) < 1:
        raise ValueError(f"text {int(numbers[lengths.argmin()])} has no token: its attention_mask is all zero")
    return lengths


@dataclass(frozen=True)
class PairLayout:
    """Where every token of every pair lies. Pairs are unique and sorted by (image, text).

    `tokens [sum(lengths)]` what the packed text table takes from the padded one `[T * L]`: the real tokens of the texts
    in the pairs; `source [R]` row of the packed table behind each row; `firsts [P]` rows of the pairs' first tokens;
    `alone` segments of the packed table; `texts` segments by pair; `images` segments by image, over all rows;
    `image_firsts` likewise over first tokens; `fixed` whether the structure is the one that compiled modules need.
    """

    tokens: Tensor
    source: Tensor
    firsts: Tensor
    alone: Segments
    texts: Segments
    images: Segments
    image_firsts: Segments
    fixed: bool

    def to(self, device: torch.device) -> PairLayout:
        """The layout with its indices on `device`."""
        parts = (self.alone, self.texts, self.images, self.image_firsts)
        tensors = [self.tokens, self.source, self.firsts, *(x for part in parts for x in part.tensors())]
        sent = iter(send(tensors, device))
        tokens, source, firsts = next(sent), next(sent), next(sent)
        alone, texts, images, image_firsts = (part.replaced(sent) for part in parts)
        return PairLayout(tokens, source, firsts, alone, texts, images, image_firsts, self.fixed)


def lay_out(pairs: Tensor, mask: Tensor, *, fixed: bool = False, all_images: bool = False) -> PairLayout:
    """The layout of `pairs [P, 2]` (unique, sorted by image) with texts of real tokens `mask [T, L]`, on the CPU.

    Args:
        fixed: as in `segments`.
        all_images: the fusion encoder will be given every image that there is, not those in the pairs alone.

    Raises:
        ValueError: a text in the pairs has no token.
    """
    used, text = torch.unique(pairs[:, 1], return_inverse=True)  # [t], [P]
    real = mask[used]  # [t, L]
    lengths = _lengths(real, used)  # [t]
    owner, column = real.nonzero(as_tuple=True)
    text_starts = torch.cumsum(lengths, 0) - lengths
    per_pair = lengths[text]  # [P]
    starts = torch.cumsum(per_pair, 0) - per_pair
    source = torch.repeat_interleave(text_starts[text] - starts, per_pair) + torch.arange(int(per_pair.sum()))
    images, image_of_pair, count = torch.unique_consecutive(pairs[:, 0], return_inverse=True, return_counts=True)
    per_image = torch.zeros(len(images), dtype=torch.int64).index_add_(0, image_of_pair, per_pair)
    by_image = [segments(x, fixed=fixed) for x in (per_image, count)]
    if all_images:
        by_image = [x.among(images) for x in by_image]
    return PairLayout(
        tokens=used[owner] * mask.shape[1] + column,
        source=source,
        firsts=starts,
        alone=segments(lengths, fixed=fixed),
        texts=segments(per_pair, fixed=fixed),
        images=by_image[0],
        image_firsts=by_image[1],
        fixed=fixed,
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

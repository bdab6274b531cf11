"""Index arithmetic of packed sequences: which rows of a flat table of tokens belong together, without padding.

Pairs are sorted by image, and their text tokens are put end to end, so that linear layers see no padding. Attention
needs rectangular tensors: `segments` takes them from the flat table, in a few buckets of similar length.

The layout that `lay_out` makes for two images and three captions of 2, 3 and 1 tokens:

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

    `texts`: segments of 2, 3, 3 and 1 rows. So few go into one bucket, which is padded with their last rows:
      rows   0 1 1    mask   1 1 0
             2 3 4           1 1 1
             5 6 7           1 1 1
             8 8 8           1 0 0
    `SMALL` or more segments are split where that saves most padding. For these lengths, the buckets would be
      8  |  0 1  |  2 3 4      without padding.
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
    """Segments of similar length: their numbers `members [n]` and padded `rows [n, M]`.

    `mask [n, M]` is false at padding; None: there is no padding.
    """

    members: Tensor
    rows: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Segments:
    """Consecutive runs of rows of a flat table, grouped into buckets.

    Attributes:
        back: `[rows]`, the position of each row of the table in the concatenated padded rows of the buckets; None: the
            only bucket is the table itself, in order and without padding.
        order: `[S]`, the position of each segment in the concatenated members of the buckets.
        whole: whether the only bucket has all segments, in order.
    """

    buckets: list[Bucket]
    back: Tensor | None
    order: Tensor
    whole: bool

    def cut(self, table: Tensor, bucket: Bucket) -> Tensor:
        """A bucket's rows of the table, `[rows, ...]` -> `[n, M, ...]`; padding repeats a row of the segment."""
        return table.unflatten(0, bucket.rows.shape) if self.back is None else table[bucket.rows]

    def pick(self, items: Tensor, bucket: Bucket) -> Tensor:
        """A bucket's items `[n, ...]` of one item per segment `[S, ...]`."""
        return items if self.whole else items.index_select(0, bucket.members)

    def unpick(self, outputs: list[Tensor]) -> Tensor:
        """Undo `pick`: one `[n, ...]` per bucket -> `[S, ...]`."""
        return outputs[0] if self.whole else torch.cat(outputs).index_select(0, self.order)

    def scatter(self, outputs: list[Tensor]) -> Tensor:
        """Undo `cut`: one `[n, M, ...]` per bucket -> `[rows, ...]`."""
        parts = [output.flatten(0, 1) for output in outputs]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        return flat if self.back is None else flat.index_select(0, self.back)

    def tensors(self) -> list[Tensor]:
        """All indices and masks."""
        every = [x for bucket in self.buckets for x in (bucket.members, bucket.rows, bucket.mask)]
        return [x for x in (*every, self.back, self.order) if x is not None]

    def replaced(self, tensors: Iterator[Tensor]) -> Segments:
        """A copy with other `tensors`, in the order of `tensors()`."""
        buckets = [
            Bucket(next(tensors), next(tensors), None if bucket.mask is None else next(tensors))
            for bucket in self.buckets
        ]
        return Segments(buckets, None if self.back is None else next(tensors), next(tensors), self.whole)

    def among(self, rows: Tensor) -> Segments:
        """A copy whose `pick` takes item `rows[s]` for segment s, from a table with more items than segments."""
        buckets = [replace(bucket, members=rows[bucket.members]) for bucket in self.buckets]
        return replace(self, buckets=buckets, whole=False)


def segments(lengths: Tensor, *, fixed: bool = False) -> Segments:
    """The buckets of consecutive segments of `lengths [S]` (int64, on the CPU, all >= 1).

    Segments are sorted by length and split into at most `MAX_BUCKETS` buckets, where that saves most padding.

    Args:
        fixed: always make `MAX_BUCKETS` buckets with masks, of at least two segments and two rows, some segments
            repeated. torch.compile then sees one structure of varying sizes (it takes a size of 1 for a constant).
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
    """The segments of each bucket: greedy cuts of the segments sorted by length, each where it saves most padding."""
    count = len(lengths)
    if count < SMALL or int(lengths.min()) == int(lengths.max()):
        return [torch.arange(count)]  # One bucket in the table's order needs no selection of rows.
    by_length = torch.argsort(lengths, stable=True)
    ordered, cuts = lengths[by_length], [0, count]
    while len(cuts) <= MAX_BUCKETS:
        best, best_saving = -1, 0
        for low, high in pairwise(cuts):
            # A cut after position m pads low..m to the length ordered[m] instead of the longest of the run.
            sizes = torch.arange(1, high - low)
            saving = sizes * (ordered[high - 1] - ordered[low : high - 1])
            if len(saving) and int(saving.max()) > best_saving:
                best, best_saving = low + int(saving.argmax()) + 1, int(saving.max())
        if best < 0:
            break
        cuts = sorted([*cuts, best])
    return [by_length[low:high] for low, high in pairwise(cuts)]


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy `tensors` from the CPU to `device`, in one transfer that does not wait for pending work of a GPU."""
    if device.type == "cpu":
        return list(tensors)
    # Larger item sizes come first, so that every tensor stays aligned.
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
    """Texts without padding: the rows `tokens [R]` of real tokens in the padded table `[T * L]`, and `segments`."""

    tokens: Tensor
    segments: Segments

    def to(self, device: torch.device) -> PackedTexts:
        """A copy with its indices on `device`."""
        tokens, *rest = send([self.tokens, *self.segments.tensors()], device)
        return PackedTexts(tokens, self.segments.replaced(iter(rest)))


def pack_texts(mask: Tensor) -> PackedTexts:
    """All texts whose real tokens are `mask [T, L]`, on the CPU.

    Raises:
        ValueError: a text has no token.
    """
    mask = mask.bool()
    return PackedTexts(mask.flatten().nonzero().squeeze(1), segments(_lengths(mask, torch.arange(len(mask)))))


def _lengths(real: Tensor, numbers: Tensor) -> Tensor:
    """The number of tokens `[t]` of each text of `real [t, L]`; errors name a text by its number in `numbers [t]`."""
    lengths = real.sum(1)
    if len(lengths) and int(lengths.min()) < 1:
        raise ValueError(f"text {int(numbers[lengths.argmin()])} has no token: its attention_mask is all zero")
    return lengths


@dataclass(frozen=True)
class PairLayout:
    """Where the tokens of each pair are. Pairs are unique and sorted by (image, text); the module has an example.

    Attributes:
        tokens: `[sum(lengths)]`, the rows of the padded table `[T * L]` that make the packed table: the real tokens of
            the texts in the pairs.
        source: `[R]`, the row of the packed table for each row of the pairs.
        firsts: `[P]`, the rows of the pairs' first tokens.
        alone: segments of the packed table, one per text.
        texts: segments of the rows by pair.
        images: segments of the rows by image.
        image_firsts: segments of the first tokens by image.
        fixed: whether the structure is the one that compiled modules need.
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
    """The layout of `pairs [P, 2]` (unique, sorted by image) and texts with real tokens `mask [T, L]`, on the CPU.

    Args:
        fixed: as in `segments`.
        all_images: the fusion encoder will get all images, not only those in the pairs.

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
    """Split sorted `pairs [P, 2]` into blocks of at most `size`; an image with at most `size` pairs is not split."""
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

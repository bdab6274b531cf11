"""The inputs of the fusion encoder for a block of pairs, in eager mode and when it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopitr.models.outputs import ImageState, KeysValues, TextState
from loopitr.models.packing import PairLayout, lay_out, send


@dataclass(frozen=True)
class FusionInput:
    """The images of some pairs and the layout of the pairs.

    Attributes:
        images: tokens `[I, N, Dv]`, or per layer keys and values `[I, H, N, D / H]`.
        layout: where the tokens of each pair are.
        regions: `[I, N, A]` of the same images for token agreement, if already projected.
    """

    images: Tensor | KeysValues
    layout: PairLayout
    regions: Tensor | None


class Arrangement(Protocol):
    """Turns pairs into an input of the fusion encoder."""

    def arrange(self, images: ImageState, mask: Tensor, pairs: Tensor) -> FusionInput:
        """The input for `pairs [P, 2]`, unique and sorted by image, of texts with real tokens `mask [T, L]`.

        Pairs and mask are on the CPU; the layout goes to the device of the images.

        Raises:
            ValueError: a text in the pairs has no token.
        """
        ...


class EagerArrangement:
    """Avoids copies of consecutive images, and uses only as many buckets as save padding."""

    def arrange(self, images: ImageState, mask: Tensor, pairs: Tensor) -> FusionInput:
        used = torch.unique_consecutive(pairs[:, 0])
        device, regions = images.tokens.device, images.regions
        if images.keys_values is not None and not _are_consecutive(used):
            # Each layer then selects from its own keys and values when it runs, so that they are not all copied now.
            return FusionInput(images.keys_values, lay_out(pairs, mask, all_images=True).to(device), regions)
        layout = lay_out(pairs, mask).to(device)
        regions = None if regions is None else pick_rows(regions, used)
        if images.keys_values is None:
            return FusionInput(pick_rows(images.tokens, used), layout, regions)
        keys_values = [(pick_rows(keys, used), pick_rows(values, used)) for keys, values in images.keys_values]
        return FusionInput(keys_values, layout, regions)


class FixedArrangement:
    """Always gives one structure: a compiled module would be recompiled for a view or another number of buckets."""

    def arrange(self, images: ImageState, mask: Tensor, pairs: Tensor) -> FusionInput:
        device = images.tokens.device
        if images.keys_values is not None:
            layout = lay_out(pairs, mask, fixed=True, all_images=True).to(device)
            return FusionInput(images.keys_values, layout, images.regions)
        (used,) = send([torch.unique_consecutive(pairs[:, 0])], device)
        tokens = images.tokens.index_select(0, used)  # [I, N, Dv]
        regions = None if images.regions is None else images.regions.index_select(0, used)  # [I, N, A]
        return FusionInput(tokens, lay_out(pairs, mask, fixed=True).to(device), regions)


def packed_tokens(texts: TextState, arranged: FusionInput) -> Tensor:
    """The tokens `[sum(lengths), D]` of the texts in an input's pairs, end to end, without padding."""
    return texts.tokens.flatten(0, 1).index_select(0, arranged.layout.tokens)


def unique_pairs(pairs: Tensor, images: int, texts: int) -> tuple[Tensor, Tensor]:
    """The distinct pairs `[U, 2]`, sorted by image, then text, and the index among them of each of `pairs [P, 2]`.

    Raises:
        ValueError: an index is negative, or not below the number of `images` or `texts`.
    """
    for column, count, kind in ((0, images, "image"), (1, texts, "text")):
        low, high = (int(x) for x in pairs[:, column].aminmax()) if len(pairs) else (0, -1)
        if low < 0 or high >= count:
            raise ValueError(f"pairs name {kind} {low if low < 0 else high}, but {kind}s are 0 to {count - 1}")
    # One number per pair: `torch.unique` of rows is much slower.
    keys, inverse = torch.unique(pairs[:, 0] * texts + pairs[:, 1], return_inverse=True)
    return torch.stack([keys // texts, keys % texts], 1), inverse


def pick_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]` for sorted, unique `rows` on the CPU; a view without a copy if they are consecutive."""
    if len(rows) == len(x):
        return x
    if _are_consecutive(rows):
        return x[int(rows[0]) : int(rows[-1]) + 1]
    return x.index_select(0, *send([rows], x.device))


def _are_consecutive(rows: Tensor) -> bool:
    """Whether sorted, unique `rows` have no gaps."""
    return int(rows[-1]) - int(rows[0]) + 1 == len(rows)

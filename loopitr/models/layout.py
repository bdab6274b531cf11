"""What the fusion encoder is handed for a block of pairs, where it runs eagerly and where it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopitr.models.outputs import ImageState, KeysValues, TextState
from loopitr.models.packing import PairLayout, lay_out, send


@dataclass(frozen=True)
class FusionInput:
    """`images`: tokens `[I, N, Dv]`, or per layer keys and values `[I, H, N, D / H]`; `layout` of their pairs;
    `regions [I, N, A]` of the same images, where they are projected already."""

    images: Tensor | KeysValues
    layout: PairLayout
    regions: Tensor | None


class Arrangement(Protocol):
    """How pairs become an input of the fusion encoder."""

    def arrange(self, images: ImageState, mask: Tensor, pairs: Tensor) -> FusionInput:
        """The input for `pairs [P, 2]`, unique and sorted by image, of texts with real tokens `mask [T, L]`.

        Pairs and mask are on the CPU; the layout goes to the device of the images.

        Raises:
            ValueError: a text in the pairs has no token.
        """
        ...


class EagerArrangement:
    """Images that follow each other are not copied, and there are only as many buckets as save padding."""

    def arrange(self, images: ImageState, mask: Tensor, pairs: Tensor) -> FusionInput:
        used = torch.unique_consecutive(pairs[:, 0])
        device, regions = images.tokens.device, images.regions
        if images.keys_values is not None and not _are_consecutive(used):
            # Every layer picks from its own keys and values, when it needs them.
            return FusionInput(images.keys_values, lay_out(pairs, mask, all_images=True).to(device), regions)
        layout = lay_out(pairs, mask).to(device)
        regions = None if regions is None else pick_rows(regions, used)
        if images.keys_values is None:
            return FusionInput(pick_rows(images.tokens, used), layout, regions)
        keys_values = [(pick_rows(keys, used), pick_rows(values, used)) for keys, values in images.keys_values]
        return FusionInput(keys_values, layout, regions)


class FixedArrangement:
    """One structure for all pairs: a compiled module would be compiled again for a view or another bucket count."""

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
    """The pairs `[U, 2]` that occur, sorted by image, then text, and where each of `pairs [P, 2]` is among them.

    Raises:
        ValueError: an index that none of so many `images` or `texts` has.
    """
    for column, count, kind in ((0, images, "image"), (1, texts, "text")):
        low, high = (int(x) for x in pairs[:, column].aminmax()) if len(pairs) else (0, -1)
        if low < 0 or high >= count:
            raise ValueError(f"pairs name {kind} {low if low < 0 else high}, but {kind}s are 0 to {count - 1}")
    keys, inverse = torch.unique(pairs[:, 0] * texts + pairs[:, 1], return_inverse=True)  # of rows: much slower
    return torch.stack([keys // texts, keys % texts], 1), inverse


def pick_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]` of sorted, unique `rows` on the CPU, without a copy where they follow each other."""
    if len(rows) == len(x):
        return x
    if _are_consecutive(rows):
        return x[int(rows[0]) : int(rows[-1]) + 1]
    return x.index_select(0, *send([rows], x.device))


def _are_consecutive(rows: Tensor) -> bool:
    """Whether sorted, unique `rows` follow each other."""
    return int(rows[-1]) - int(rows[0]) + 1 == len(rows)

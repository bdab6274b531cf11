"""What the fusion encoder is handed for a block of pairs, where it runs eagerly and where it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loopitr.models.outputs import ImageState, KeysValues
from loopitr.models.packing import PairLayout, lay_out, send


@dataclass(frozen=True)
class FusionInput:
    """`images`: tokens `[I, N, Dv]`, or per layer keys and values `[I, H, N, D / H]`; `layout` of their pairs."""

    images: Tensor | KeysValues
    layout: PairLayout


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
        device = images.tokens.device
        if images.keys_values is None:
            return FusionInput(pick_rows(images.tokens, used), lay_out(pairs, mask).to(device))
        if not _are_consecutive(used):
            # Every layer picks from its own keys and values when it needs them.
            return FusionInput(images.keys_values, lay_out(pairs, mask, all_images=True).to(device))
        keys_values = [(pick_rows(keys, used), pick_rows(values, used)) for keys, values in images.keys_values]
        return FusionInput(keys_values, lay_out(pairs, mask).to(device))


class FixedArrangement:
    """One structure for all pairs: a compiled module would be compiled again for a view or another bucket count."""

    def arrange(self, images: ImageState, mask: Tensor, pairs: Tensor) -> FusionInput:
        device = images.tokens.device
        if images.keys_values is not None:
            return FusionInput(images.keys_values, lay_out(pairs, mask, fixed=True, all_images=True).to(device))
        used = torch.unique_consecutive(pairs[:, 0])
        tokens = images.tokens.index_select(0, *send([used], device))  # [I, N, Dv]
        return FusionInput(tokens, lay_out(pairs, mask, fixed=True).to(device))


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

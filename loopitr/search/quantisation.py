"""Shorter and smaller vectors: the first dimensions alone, one byte or one bit per dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loopitr.checks import check_known

PRECISIONS = ("float32", "int8", "binary")
STEPS = 255  # between the 256 values of a byte


@dataclass(frozen=True)
class VectorForm:
    """What vectors are turned into.

    truncate_dim: keep so many of the first dimensions, and make the vectors unit length again; None: all.
    precision: float32, int8 or binary, see `quantize`.
    ranges: `[2, E]`, the least and the greatest value of each dimension for int8; None: of the vectors themselves.
    """

    truncate_dim: int | None = None
    precision: str = "float32"
    ranges: np.ndarray | None = None

    def check(self, count: int, width: int) -> None:
        """Whether `count` vectors of `width` dimensions can have this form; asked before they are computed.

        Raises:
            ValueError: an unknown precision, a number of dimensions that they do not have, ranges of another shape or
                upside down, or the ranges of int8 taken from a single vector.
        """
        check_known(PRECISIONS, precision=self.precision)
        kept = width if self.truncate_dim is None else self.truncate_dim
        if not 1 <= kept <= width:
            raise ValueError(f"truncate_dim must be from 1 to the vectors' {width} dimensions, got {kept}")
        if self.ranges is not None:
            low_high = np.asarray(self.ranges)
            if low_high.shape != (2, kept) or not (low_high[0] <= low_high[1]).all():
                wanted = f"[2, {kept}], the least and the greatest value of each dimension"
                raise ValueError(f"ranges must be {wanted}, got {list(low_high.shape)}")
        elif self.precision == "int8" and count == 1:
            raise ValueError("int8 needs ranges for a single vector: ranges=np.stack([a.min(0), a.max(0)]) of others")

    def of(self, embeds: np.ndarray) -> np.ndarray:
        """Unit vectors `[n, E]` in this form."""
        if self.truncate_dim is not None:
            embeds = shorten(embeds, self.truncate_dim)
        return quantize(embeds, self.precision, ranges=self.ranges)


def shorten(embeds: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` dimensions of vectors `[n, E]`, of unit length again: `[n, dim]`.

    A dot product is a cosine of unit vectors only (Matryoshka representations, arXiv 2205.13147).
    """
    cut = embeds[:, :dim]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def quantize(embeds: np.ndarray, precision: str, *, ranges: np.ndarray | None = None) -> np.ndarray:
    """Vectors `[n, E]` in fewer bits, the same values as of sentence-transformers' `quantize_embeddings`.

    - float32: as they are.
    - int8: each dimension's range, from its least to its greatest value, is cut into 256 steps, numbered -128 to 127
      (floor); values outside the ranges get the last step. The steps of two sets of vectors mean the same only where
      both have the same `ranges`; without, they are those of `embeds`.
    - binary: one bit per dimension, 1 where the value is above 0, eight to a byte, the first in the highest bit, less
      128: `[n, ceil(E / 8)]` int8. The Hamming distance of two is their number of unequal signs.

    Example:
        >>> import numpy as np
        >>> from loopitr.search.quantisation import quantize
        >>> embeds = np.array([[0.6, -0.8], [-1.0, 0.0]], dtype=np.float32)
        >>> quantize(embeds, "int8").tolist(), quantize(embeds, "binary").tolist()
        ([[127, -128], [-128, 127]], [[0], [-128]])
    """
    if precision == "binary":
        return (np.packbits(embeds > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)  # [n, ceil(E / 8)]
    if precision == "float32":
        return embeds.astype(np.float32)
    if not len(embeds):
        return embeds.astype(np.int8)
    if ranges is None:
        ranges = np.stack([embeds.min(0), embeds.max(0)])
    low, high = np.asarray(ranges, dtype=np.float32)
    step = (high - low) / STEPS
    step = np.where(step == 0, 1, step)  # A dimension may have one value only.
    return (np.clip(np.floor((embeds - low) / step), 0, STEPS) - 128).astype(np.int8)

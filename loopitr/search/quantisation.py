"""Smaller vectors: cut to their first dimensions, or quantised to one byte or one bit per dimension."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loopitr.checks import check_known, check_whole

PRECISIONS = ("float32", "int8", "binary")
STEPS = 255  # the number of steps between the 256 values of a byte


@dataclass(frozen=True)
class VectorForm:
    """The form of vectors: their length and precision.

    Args:
        truncate_dim: cut vectors to this length and normalise them again; None: do not cut them.
        precision: float32, int8 or binary, see `quantize`.
        ranges: for int8, the least and the greatest value of each dimension, `[2, E]`; None: those of the vectors.
    """

    truncate_dim: int | None = None
    precision: str = "float32"
    ranges: np.ndarray | None = None

    def check(self, count: int, width: int) -> None:
        """Check that `count` vectors of `width` dimensions can have this form, before they are computed.

        Raises:
            ValueError: the precision is unknown, the vectors are shorter than `truncate_dim`, ranges have another shape
                or are reversed, or int8 has only a single vector to take ranges from.
        """
        check_known(PRECISIONS, precision=self.precision)
        check_whole(0, unset=True, truncate_dim=self.truncate_dim)
        kept = width if self.truncate_dim is None else self.truncate_dim
        if not 1 <= kept <= width:
            raise ValueError(f"truncate_dim must be from 1 to the vectors' {width} dimensions, got {kept}")
        if self.ranges is not None:
            low_high = np.asarray(self.ranges)
            if low_high.shape != (2, kept) or not (low_high[0] <= low_high[1]).all() or not np.isfinite(low_high).all():
                wanted = f"[2, {kept}], the least and the greatest value of each dimension, all finite"
                raise ValueError(f"ranges must be {wanted}, got {list(low_high.shape)}")
        elif self.precision == "int8" and count == 1:
            raise ValueError("int8 needs ranges for a single vector: ranges=np.stack([a.min(0), a.max(0)]) of others")

    def of(self, embeds: np.ndarray) -> np.ndarray:
        """Convert unit vectors `[n, E]` to this form."""
        if self.truncate_dim is not None:
            embeds = shorten(embeds, self.truncate_dim)
        return quantize(embeds, self.precision, ranges=self.ranges)


def shorten(embeds: np.ndarray, dim: int) -> np.ndarray:
    """Cut vectors `[n, E]` to `[n, dim]`, and normalise them again, so that their dot products are cosines.

    This is meant for Matryoshka representations (arXiv 2205.13147).
    """
    cut = embeds[:, :dim]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def quantize(embeds: np.ndarray, precision: str, *, ranges: np.ndarray | None = None) -> np.ndarray:
    """Quantise vectors `[n, E]`, to the same values as sentence-transformers' `quantize_embeddings`.

    - float32: unchanged.
    - int8: the range of each dimension is divided into 255 steps, numbered -128 to 127 (rounded down); values outside
      of it get the first or the last number. Two sets of vectors can only be compared if they have the same `ranges`;
      None: those of `embeds`.
    - binary: one bit per dimension, 1 for values above 0, eight to a byte with the first in the highest bit, minus 128:
      `[n, ceil(E / 8)]` int8. The Hamming distance of two vectors is the number of dimensions whose signs differ.

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
    step = np.where(step == 0, 1, step)  # A dimension may have only one value.
    return (np.clip(np.floor((embeds - low) / step), 0, STEPS) - 128).astype(np.int8)

"""The options of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loopitr.checks import check_at_least

from .storage import TokenStorage


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of `evaluate_retrieval`. Those from `batch_size` on change speed and memory, not results.

    Args:
        rerank: the number of candidates per query that the fusion head scores; 0: evaluate the dual encoder alone,
            which a `DualEncoder` needs.
        captions_per_image: the number of captions of each image to use, the first ones (COCO and Flickr: 5); None: all.
        max_images: the number of records to use, the first ones; None: all.
        max_skipped_fraction: raise an error if more than this fraction of the images cannot be used.
        graded: also measure graded relevance and paraphrase stability, if the records have the ground truth.
        dims: also evaluate the dual encoder with its embeds cut to each of these lengths.
        calibrate: fit the similarity weight of the reranking score on these candidates (`calibration.py`), instead of
            using the model's `config.similarity_weight`; the model is not changed.
        examples: the number of example queries of each direction in the result, for `gallery_page`.
        batch_size: the number of captions, and of images up to `image_block`, that are encoded at a time.
        image_block: the number of images whose tokens, keys and values are in memory at a time while reranking.
        pair_block: the number of pairs that are scored at a time.
        num_workers: the number of processes that decode images; 0: none but this one.
        token_storage: where tokens are stored between encoding and reranking. A `dtype` of half precision changes
            results a little.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> from loopitr import EvaluationOptions
        >>> EvaluationOptions(rerank=16, captions_per_image=5).graded
        True
    """

    rerank: int = 64
    captions_per_image: int | None = None
    max_images: int | None = None
    max_skipped_fraction: float = 0.05
    graded: bool = True
    dims: Sequence[int] = ()
    calibrate: bool = False
    examples: int = 0
    batch_size: int = 64
    image_block: int = 32
    pair_block: int = 1024
    num_workers: int = 2
    token_storage: TokenStorage = field(default_factory=TokenStorage)

    def __post_init__(self) -> None:
        check_at_least(0, rerank=self.rerank, examples=self.examples, num_workers=self.num_workers)
        check_at_least(
            1,
            batch_size=self.batch_size,
            image_block=self.image_block,
            pair_block=self.pair_block,
            captions_per_image=self.captions_per_image,
            max_images=self.max_images,
        )
        for dim in self.dims:
            check_at_least(1, dims=dim)

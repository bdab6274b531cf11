"""What an evaluation is asked for, and in what portions it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loopitr.checks import check_at_least

from .storage import TokenStorage


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of `evaluate_retrieval`. None of the portions, nor where tokens wait, changes a figure.

    Args:
        rerank: candidates per query for the fusion head; 0: the dual encoder alone, which is all that a `DualEncoder`
            can do.
        captions_per_image: each image's first so many captions are used (COCO and Flickr: 5); None: all.
        max_images: the first so many records are used; None: all.
        max_skipped_fraction: the evaluation stops when more of the images than this cannot be used.
        graded: whether graded relevance and paraphrase stability are measured too, where the records have the ground
            truth for it.
        dims: the dual encoder is also measured at the first so many dimensions of its embeds.
        calibrate: whether the weight of the similarity in the reranking score is fitted on these candidates
            (`calibration.py`), instead of the model's `config.similarity_weight`; the model is not changed.
        examples: queries of each direction that the result has with their first answers, for `gallery_page`; 0: none.
        batch_size: captions, and images up to `image_block`, that are encoded at a time.
        image_block: images whose tokens, keys and values are held at a time while reranking.
        pair_block: pairs that are scored at a time.
        num_workers: processes that decode images; 0: this one does.
        token_storage: where image and caption tokens wait between encoding and reranking, and in what type.

    Raises:
        ValueError: a number out of range.

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

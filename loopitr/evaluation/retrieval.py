"""Karpathy-style retrieval: every image against every caption with the dual head, the best candidates reranked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from loopitr.data import LoadReport, Record, TextTokenCache, TokenCache, name_of, relevance_of
from loopitr.distributed import each_rank, first_rank, rank, world_size
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor

from .gallery import account, build_gallery, evaluation_transform
from .graded import grade
from .image_tokens import ImageTokens
from .nearest import nearest
from .options import EvaluationOptions
from .report import RetrievalResult
from .reranking import CandidateScores, candidate_pairs, candidate_scores, score_candidates
from .reranking import rerank as rerank_candidates
from .text_tokens import TextTokens

__all__ = ["EvaluationOptions", "RetrievalResult", "evaluate_retrieval", "evaluation_transform"]


def evaluate_retrieval(
    model: LoopITRModel | DualEncoder,
    processor: LoopITRProcessor,
    records: Sequence[Record],
    options: EvaluationOptions | None = None,
    *,
    tokens: TokenCache | None = None,
    text_tokens: TextTokenCache | None = None,
    device: str | torch.device | None = None,
    report: LoadReport | None = None,
    progress: bool = True,
) -> RetrievalResult:
    """Recall of all images against all captions of `records`, by the dual head alone and reranked.

    Reranked: each image's `options.rerank` most similar captions and each caption's as many most similar images; the
    union of both directions' pairs is scored once. Candidates are ordered by match score (ALBEF, arXiv 2107.07651), and
    by match score + similarity / temperature. BLIP (arXiv 2201.12086) adds the bare cosine to the matching logit;
    divided by the temperature, as in the contrastive loss, it is on the same log-odds scale as the match score. A right
    answer that is not among the candidates is a miss at every k. Right answers are those of equal identity.

    The model runs in eval mode, under the caller's autocast, and every module comes back in the mode it had.

    Under torch.distributed every rank must call this, with the same weights and arguments: each encodes its share of
    the images and captions and scores the pairs of its images, and all return the whole result.

    Args:
        model: the model, or its dual encoder alone, for which `options.rerank` must be 0.
        processor: turns images into pixels and captions into token ids.
        records: the images with their captions.
        options: what is measured and in what portions; None: the defaults of `EvaluationOptions`.
        tokens: image tokens computed earlier for these records, which are read instead of the images.
        text_tokens: what the text backbone made of these records' captions earlier; it does not run then.
        device: where to move the model first; None: it stays where it is.
        report: every image and caption left out is counted here too.
        progress: whether the first rank shows progress bars.

    Raises:
        DataError: nothing to evaluate on, too much unreadable, or tokens that do not fit where they are to wait.
        ValueError: reranking is asked for without a fusion head, or `tokens` are fewer than the records.

    Example:
        >>> from loopitr import build_model, evaluate_retrieval, load_records
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> from loopitr.data import DataOptions, LoadReport, scene_vocabulary
        >>> model_options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> model, processor = build_model(model_options, vocabulary=scene_vocabulary())
        >>> records = load_records(DataOptions(limit=4), "test", LoadReport())
        >>> result = evaluate_retrieval(model, processor, records)
        >>> result.num_images, sorted(result.rankings)
        (4, ['dual', 'match', 'match_plus_similarity'])
    """
    options = options or EvaluationOptions()
    rerank = options.rerank
    if rerank and not isinstance(model, LoopITRModel):
        raise ValueError(f"a {type(model).__name__} has no fusion head to rerank with: rerank must be 0, got {rerank}")
    storage = options.token_storage if rerank else None
    if device is not None:
        nn.Module.to(model, device)
    dual = model.dual_encoder() if isinstance(model, LoopITRModel) else model
    clock = _Clock(dual.logit_scale.device)
    images = ImageTokens(
        dual,
        records,
        evaluation_transform(processor),
        cache=tokens,
        batch_size=min(options.batch_size, options.image_block),
        num_workers=options.num_workers,
    )
    skipped = LoadReport()
    count = len(records) if options.max_images is None else min(options.max_images, len(records))
    progress = progress and rank() == 0
    with _evaluating(model), torch.inference_mode():
        # An image without captions is not worth decoding, and captions of an unreadable one not worth encoding.
        captioned = build_gallery(
            records, range(count), skipped, captions_per_image=options.captions_per_image
        ).positions
        own_images = [captioned[index] for index in _share(len(captioned))]
        encoded = each_rank(lambda: images.encode(own_images, storage=storage, progress=progress))
        for position, reason in (failure for part in encoded for failure in part.failed):
            skipped.skip(f"unreadable image: {reason}", name_of(records, position))
        readable = [position for part in encoded for position in part.positions]
        gallery = build_gallery(records, readable, LoadReport(), captions_per_image=options.captions_per_image)
        account(skipped, report, gallery, count, options.max_skipped_fraction)
        texts = TextTokens(
            model if rerank else dual,
            processor,
            gallery.captions,
            batch_size=options.batch_size,
            storage=storage,
            cache=text_tokens,
        )
        own_texts = torch.tensor(_share(len(gallery.captions)), dtype=torch.int64)
        text_parts = each_rank(lambda: texts.encode(own_texts, progress=progress))
        texts.embeds = torch.cat(text_parts).to(clock.device)  # [T, E]
        clock.lap("encode")
        image_embeds = torch.cat([part.embeds for part in encoded])  # [I, E] on the CPU
        candidates = first_rank(  # all ranks use its candidates, so that they agree on the pairs
            lambda: nearest(
                image_embeds.to(clock.device),
                texts.embeds,
                gallery.image_identities.to(clock.device),
                gallery.text_identities.to(clock.device),
                k=max(1, rerank),
            )
        )
        clock.lap("rank")
        rankings, num_pairs = {"dual": candidates.ranking}, 0
        reranked: dict[str, CandidateScores] = {}
        if rerank and isinstance(model, LoopITRModel):
            pairs = candidate_pairs(candidates)
            before = sum(len(part.positions) for part in encoded[: rank()])
            score = partial(
                _score_own,
                model,
                images,
                texts,
                pairs,
                encoded[rank()].positions,
                before,
                options=options,
                progress=progress,
            )
            scores = torch.cat(each_rank(score))  # [P]
            reranked = candidate_scores(candidates, pairs, scores, scale=float(dual.scale))
            rankings.update(rerank_candidates(candidates, reranked, gallery))
            num_pairs = len(pairs)
        clock.lap("rerank")
        relevance = relevance_of(records, gallery.positions) if options.graded else None
        measured = {}
        if relevance is not None:
            measured = first_rank(
                partial(
                    grade,
                    image_embeds,
                    texts.embeds.cpu(),
                    candidates,
                    reranked,
                    relevance=relevance,
                    caption_rows=gallery.caption_rows,
                )
            )
    return RetrievalResult(
        num_images=len(gallery.positions),
        num_captions=len(gallery.captions),
        k=rerank,
        rankings=rankings,
        num_pairs=num_pairs,
        seconds={**clock.laps, "total": sum(clock.laps.values())},
        skipped=skipped,
        truncated=texts.truncated,
        graded=measured,
    )


def _share(count: int) -> range:
    """This rank's of `count` items: ranks' shares are consecutive and differ by one at most."""
    return range(rank() * count // world_size(), (rank() + 1) * count // world_size())


def _score_own(
    model: LoopITRModel,
    images: ImageTokens,
    texts: TextTokens,
    pairs: Tensor,
    positions: list[int],
    before: int,
    *,
    options: EvaluationOptions,
    progress: bool,
) -> Tensor:
    """Match scores of those of `pairs [P, 2]` whose images are this rank's: `positions`, numbered from `before` on."""
    ends = torch.tensor([before, before + len(positions)])
    low, high = torch.searchsorted(pairs[:, 0].contiguous(), ends).tolist()
    own = pairs[low:high] - torch.tensor([before, 0])  # [p, 2]
    texts.keep(own[:, 1].unique(), progress=progress)
    blocks = images.blocks(positions, options.image_block)
    return score_candidates(model, blocks, texts, own, pair_block=options.pair_block, progress=progress)


class _Clock:
    """Seconds by name, of work that is done: a GPU is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, dict[str, float]()
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

"""Karpathy-style retrieval: the dual head ranks all images and captions, and the best candidates are reranked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopitr.data import LoadReport, Record, TextTokenCache, TokenCache, name_of, relevance_of
from loopitr.distributed import each_rank, first_rank, rank, world_size
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor

from .calibration import Gain, fit_similarity_weight, reranking_gain
from .clock import Clock
from .coco import DEPTH, CocoBenchmarks
from .examples import SHOWN, Examples, Reranked, choose_examples
from .gallery import Gallery, account, build_gallery, distinct_images, evaluation_transform
from .graded import GradedMetrics, grade
from .image_tokens import ImageTokens
from .nearest import Nearest, nearest
from .options import EvaluationOptions
from .report import RetrievalResult
from .reranking import CandidateScores, candidate_pairs, score_candidates, scored_candidates
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
    coco: CocoBenchmarks | None = None,
    progress: bool = True,
) -> RetrievalResult:
    """Recalls of all images against all captions of `records`, by the dual head alone and after reranking.

    Reranked are each image's `options.rerank` most similar captions and each caption's `options.rerank` most similar
    images; a pair that occurs in both directions is scored once. Candidates are ordered in three ways: by match score
    (ALBEF, arXiv 2107.07651), by match score + similarity / temperature, and by the reranking score, which weighs the
    similarity by the model's `config.similarity_weight`. (BLIP, arXiv 2201.12086, adds the cosine without temperature.
    Divided by it, the similarity is on the same log-odds scale as the match score.) A right answer has the query's
    identity; one that is not among the candidates is a miss at every k. Records that show the same image, as where each
    caption has a row of its own, are one image.

    The model runs in eval mode, under the caller's autocast; afterwards all modules are in their former mode.

    Under torch.distributed every rank must call this, with the same weights and arguments. Each rank encodes its share
    of the images and captions and scores the pairs of its images, and all return the whole result.

    Args:
        model: the model, or its dual encoder alone, for which `options.rerank` must be 0.
        processor: turns images into pixels and captions into token ids.
        records: the images with their captions.
        options: None: the defaults of `EvaluationOptions`.
        tokens: a cache of image tokens of these records, read instead of the images.
        text_tokens: a cache of the text backbone's output for these records' captions, used instead of running it.
        device: where to move the model first; None: it is not moved.
        report: also counts the images and captions that are skipped.
        coco: also measure ECCV Caption and CxC, on COCO's whole Karpathy test split.
        progress: show progress bars on the first rank.

    Raises:
        DataError: there is nothing to evaluate on, too many images are unreadable, or tokens do not fit into their
            storage.
        ValueError: reranking needs a fusion head, or `tokens` has fewer images than the records.

    Example:
        >>> from loopitr import build_model, evaluate_retrieval, load_records
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> from loopitr.data import DataOptions, LoadReport, scene_vocabulary
        >>> model_options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> model, processor = build_model(model_options, vocabulary=scene_vocabulary())
        >>> records = load_records(DataOptions(scenes=True, limit=4), "test", LoadReport())
        >>> result = evaluate_retrieval(model, processor, records)
        >>> result.num_images, sorted(result.rankings)
        (4, ['dual', 'match', 'match_plus_similarity', 'reranked'])
    """
    options = options or EvaluationOptions()
    if options.rerank and not isinstance(model, LoopITRModel):
        kind = type(model).__name__
        raise ValueError(f"a {kind} has no fusion head to rerank with: rerank must be 0, got {options.rerank}")
    if device is not None:
        nn.Module.to(model, device)
    dual = model.dual_encoder() if isinstance(model, LoopITRModel) else model
    clock = Clock(dual.logit_scale.device)
    images = ImageTokens(
        dual,
        records,
        evaluation_transform(processor),
        cache=tokens,
        batch_size=min(options.batch_size, options.image_block),
        num_workers=options.num_workers,
    )
    progress = progress and rank() == 0
    with _evaluating(model), torch.inference_mode():
        encoded = _encode(model, processor, images, options, text_cache=text_tokens, report=report, progress=progress)
        clock.lap("encode")
        candidates = _candidates(encoded, options.rerank or (SHOWN if options.examples else 1))
        rankings = {"dual": candidates.ranking}
        clock.lap("rank")
        examples: dict[str, Examples] = {}
        reranking: Reranked | None = None
        pairs, reranked = torch.empty(0, 2, dtype=torch.int64), dict[str, CandidateScores]()
        weight: float | None = None
        gain: Gain | None = None
        if options.rerank and isinstance(model, LoopITRModel):
            pairs = candidate_pairs(candidates)
            scores = torch.cat(each_rank(partial(_score_own, model, encoded, pairs, options, progress=progress)))  # [P]
            clock.lap("rerank")
            scored = scored_candidates(candidates, pairs, scores, encoded.gallery, scale=float(dual.scale))
            weight = model.config.similarity_weight
            if options.calibrate:
                weight = first_rank(partial(fit_similarity_weight, scored))
            reranked = scored.reranked(weight)
            rankings.update({name: scored.ranking(values) for name, values in reranked.items()})
            gain = reranking_gain(candidates.ranking, rankings["reranked"], encoded.gallery.caption_rows)
            reranking = Reranked(match=scored.match, scores=reranked["reranked"], ranking=rankings["reranked"])
        if options.examples:
            examples = choose_examples(candidates, encoded.gallery, reranking, number=options.examples)
        graded = _grade(encoded, candidates, reranked) if options.graded else {}
        figures = {} if coco is None else _coco_figures(coco, encoded, candidates, reranked)
        shortened = {dim: _candidates(encoded, 1, dim=dim).ranking for dim in options.dims}
    return RetrievalResult(
        num_images=len(encoded.gallery.positions),
        num_captions=len(encoded.gallery.captions),
        k=options.rerank,
        rankings=rankings,
        num_pairs=len(pairs),
        seconds={**clock.laps, "total": sum(clock.laps.values())},
        skipped=encoded.skipped,
        truncated=encoded.texts.truncated,
        graded=graded,
        similarity_weight=weight,
        calibrated=weight is not None and options.calibrate,
        gain=gain,
        examples=examples,
        shortened=shortened,
        coco=figures,
    )


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """An encoded gallery.

    Attributes:
        gallery: the readable images with captions, and their captions; the same on every rank.
        image_embeds: `[I, E]` of all images, on the CPU.
        images: the tokens of this rank's images.
        texts: the embeds `[T, E]` of all captions, on the model's device, and the tokens of any of them.
        own_images: the range of this rank's images in the gallery.
        skipped: counts what was skipped.
    """

    gallery: Gallery
    image_embeds: Tensor
    images: ImageTokens
    texts: TextTokens
    own_images: range
    skipped: LoadReport


def _encode(
    model: LoopITRModel | DualEncoder,
    processor: LoopITRProcessor,
    images: ImageTokens,
    options: EvaluationOptions,
    *,
    text_cache: TextTokenCache | None,
    report: LoadReport | None,
    progress: bool,
) -> _Encoded:
    """Run the backbones on this rank's share of the images and captions, and gather the embeds of all ranks."""
    records, skipped = images.records, LoadReport()
    storage = options.token_storage if options.rerank else None
    count = len(records) if options.max_images is None else min(options.max_images, len(records))
    # Images without captions are not decoded, and captions of unreadable images are not encoded.
    distinct = distinct_images(records, count)
    captioned = build_gallery(records, distinct, skipped, captions_per_image=options.captions_per_image).positions
    share = [captioned[index] for index in _share(len(captioned))]
    image_parts = each_rank(lambda: images.encode(share, storage=storage, progress=progress))
    for position, reason in (failure for part in image_parts for failure in part.failed):
        skipped.skip(f"unreadable image: {reason}", name_of(records, position))
    readable = {position for part in image_parts for position in part.positions}
    left = [positions for positions in distinct if positions[0] in readable]
    gallery = build_gallery(records, left, LoadReport(), captions_per_image=options.captions_per_image)
    account(skipped, report, gallery, len(distinct), options.max_skipped_fraction)
    text_model = model if options.rerank or isinstance(model, DualEncoder) else model.dual_encoder()
    texts = TextTokens(
        text_model, processor, gallery.captions, batch_size=options.batch_size, storage=storage, cache=text_cache
    )
    own_texts = torch.tensor(_share(len(gallery.captions)), dtype=torch.int64)
    text_parts = each_rank(lambda: texts.encode(own_texts, progress=progress))
    texts.embeds = torch.cat(text_parts).to(images.parameter.device)  # [T, E]
    before = sum(len(part.positions) for part in image_parts[: rank()])
    return _Encoded(
        gallery=gallery,
        image_embeds=torch.cat([part.embeds for part in image_parts]),  # [I, E]
        images=images,
        texts=texts,
        own_images=range(before, before + len(image_parts[rank()].positions)),
        skipped=skipped,
    )


def _candidates(encoded: _Encoded, k: int, *, dim: int | None = None) -> Nearest:
    """The `k` nearest candidates of each query by the dual head, or by the first `dim` dimensions of its embeds.

    All ranks get those of the first rank, so that they agree on the pairs.
    """
    gallery, image_embeds, text_embeds = encoded.gallery, encoded.image_embeds, encoded.texts.embeds
    if dim is not None:
        if dim > text_embeds.shape[1]:
            raise ValueError(f"dims must be at most the embeds' {text_embeds.shape[1]} dimensions, got {dim}")
        image_embeds, text_embeds = (F.normalize(x[:, :dim].float(), dim=-1) for x in (image_embeds, text_embeds))
    device = text_embeds.device
    return first_rank(
        lambda: nearest(
            image_embeds.to(device),
            text_embeds,
            gallery.image_identities.to(device),
            gallery.text_identities.to(device),
            k=k,
        )
    )


def _score_own(
    model: LoopITRModel, encoded: _Encoded, pairs: Tensor, options: EvaluationOptions, *, progress: bool
) -> Tensor:
    """Match scores (CPU) of the pairs of this rank's images, among `pairs [P, 2]`, sorted by image."""
    images, texts, own_images = encoded.images, encoded.texts, encoded.own_images
    ends = torch.tensor([own_images.start, own_images.stop])
    low, high = torch.searchsorted(pairs[:, 0].contiguous(), ends).tolist()
    own = pairs[low:high] - torch.tensor([own_images.start, 0])  # [p, 2]
    texts.keep(own[:, 1].unique(), progress=progress)
    positions = encoded.gallery.positions[own_images.start : own_images.stop]
    blocks = images.blocks(positions, options.image_block)
    return score_candidates(model, blocks, texts, own, pair_block=options.pair_block, progress=progress)


def _grade(encoded: _Encoded, candidates: Nearest, reranked: Mapping[str, CandidateScores]) -> dict[str, GradedMetrics]:
    """The graded metrics of each ranking; empty if the records have no graded relevance."""
    relevance = relevance_of(encoded.images.records, encoded.gallery.positions)
    if relevance is None:
        return {}
    return first_rank(
        lambda: grade(
            encoded.image_embeds,
            encoded.texts.embeds.cpu(),
            candidates,
            reranked,
            relevance=relevance,
            caption_rows=encoded.gallery.caption_rows,
        )
    )


def _coco_figures(
    coco: CocoBenchmarks, encoded: _Encoded, candidates: Nearest, reranked: Mapping[str, CandidateScores]
) -> dict[str, dict[str, dict[str, float]]]:
    widest = _candidates(encoded, DEPTH)
    return first_rank(lambda: coco.figures(encoded.gallery, encoded.images.records, widest, candidates, reranked))


def _share(count: int) -> range:
    """This rank's share of `count` items; shares are consecutive, and their sizes differ by at most one."""
    return range(rank() * count // world_size(), (rank() + 1) * count // world_size())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which `model` is in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

"""Karpathy-style retrieval: every image against every caption with the dual head, the best candidates reranked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loopitr.data import DataError, LoadReport, Record, TokenCache, name_of
from loopitr.model import DualEncoder, LoopITRModel
from loopitr.processing import LoopITRProcessor

from .gallery import Gallery, evaluation_transform, gallery
from .nearest import nearest
from .report import RetrievalResult
from .reranking import candidate_pairs
from .reranking import rerank as rerank_candidates
from .reranking import score_candidates
from .tokens import ImageTokens, TextTokens

__all__ = ["RetrievalResult", "evaluate_retrieval", "evaluation_transform"]


def evaluate_retrieval(
    model: LoopITRModel | DualEncoder,
    processor: LoopITRProcessor,
    records: Sequence[Record],
    *,
    rerank: int = 64,
    batch_size: int = 64,
    num_workers: int = 2,
    image_block: int = 32,
    pair_block: int = 1024,
    device: str | torch.device | None = None,
    tokens: TokenCache | None = None,
    token_memory: int = 2**30,
    captions_per_image: int | None = None,
    max_images: int | None = None,
    max_skipped_fraction: float = 0.05,
    report: LoadReport | None = None,
    progress: bool = True,
) -> RetrievalResult:
    """Recall of all images against all captions of `records`, by the dual head alone and reranked.

    Reranked: each image's `rerank` most similar captions and each caption's `rerank` most similar images; the union of
    both directions' pairs is scored once. Candidates are ordered by match score (ALBEF, arXiv 2107.07651), and by match
    score + similarity / temperature. BLIP (arXiv 2201.12086) adds the bare cosine to the matching logit; divided by the
    temperature, as in the contrastive loss, it is on the same log-odds scale as the match score. A right answer that
    is not among the candidates is a miss at every k. Right answers are those of equal identity.

    The model runs in eval mode, under the caller's autocast, and every module comes back in the mode it had.

    Args:
        rerank: candidates per query; 0: dual only, which is all that a `DualEncoder` can do.
        batch_size: captions, and images up to `image_block`, encoded at a time.
        image_block: images whose tokens, keys and values are held at a time while reranking.
        pair_block: pairs scored at a time.
        device: where to move the model first; None: where it is.
        tokens: image tokens computed earlier for these records.
        token_memory: bytes of tokens (half captions', half images') that may be kept between encoding and reranking.
            What does not fit is computed again block by block, so memory does not grow with the data.
        captions_per_image: use each image's first so many (COCO and Flickr evaluation: 5); None: all.
        max_images: evaluate on the first so many records.
        max_skipped_fraction: stop when more of the images than this cannot be used.
        report: is told of every image and caption left out.

    Raises:
        DataError: nothing to evaluate on, or too much unreadable.
        ValueError: an option out of range, or `rerank` without a fusion head.
    """
    _at_least(0, rerank=rerank, num_workers=num_workers, token_memory=token_memory)
    _at_least(1, batch_size=batch_size, image_block=image_block, pair_block=pair_block)
    _at_least(1, captions_per_image=captions_per_image, max_images=max_images)
    if rerank and not isinstance(model, LoopITRModel):
        raise ValueError(f"a {type(model).__name__} has no fusion head to rerank with: rerank must be 0, got {rerank}")
    if device is not None:
        nn.Module.to(model, device)
    dual = model.dual_encoder() if isinstance(model, LoopITRModel) else model
    clock = _Clock(dual.logit_scale.device)
    images = ImageTokens(
        dual,
        records,
        evaluation_transform(processor),
        cache=tokens,
        batch_size=min(batch_size, image_block),
        num_workers=num_workers,
    )
    skipped = LoadReport()
    count = len(records) if max_images is None else min(max_images, len(records))
    memory = token_memory // 2 if rerank else 0
    with _evaluating(model), torch.inference_mode():
        # An image without captions is not worth decoding, and captions of an unreadable one not worth encoding.
        searched = gallery(records, range(count), skipped, captions_per_image=captions_per_image)
        embeds = _embed_images(images, searched.positions, records, skipped, memory=memory, progress=progress)
        searched = gallery(records, list(embeds), LoadReport(), captions_per_image=captions_per_image)
        _account(skipped, report, searched, count, max_skipped_fraction)
        image_embeds = torch.stack(list(embeds.values()))  # [I, E]
        texts = TextTokens(model if rerank else dual, processor, searched.captions, batch_size=batch_size)
        with tqdm(total=len(searched.captions), desc="encode captions", disable=not progress, leave=False) as bar:
            for done in texts.embed(memory=memory):
                bar.update(done)
        clock.lap("encode")
        found = nearest(
            image_embeds,
            texts.embeds,
            searched.image_identities.to(image_embeds.device),
            searched.text_identities.to(image_embeds.device),
            k=max(1, rerank),
        )
        clock.lap("rank")
        rankings, num_pairs = {"dual": found.ranking}, 0
        if rerank and isinstance(model, LoopITRModel):
            pairs = candidate_pairs(found)
            blocks = images.blocks(searched.positions, image_block)
            scores = score_candidates(model, blocks, texts, pairs, pair_block=pair_block, progress=progress)
            rankings.update(rerank_candidates(found, pairs, scores, searched, scale=float(dual.scale)))
            num_pairs = len(pairs)
        clock.lap("rerank")
    return RetrievalResult(
        num_images=len(searched.positions),
        num_captions=len(searched.captions),
        k=rerank,
        rankings=rankings,
        num_pairs=num_pairs,
        seconds={**clock.laps, "total": sum(clock.laps.values())},
        skipped=skipped,
        truncated=texts.truncated,
    )


def _embed_images(
    images: ImageTokens,
    positions: list[int],
    records: Sequence[Record],
    skipped: LoadReport,
    *,
    memory: int,
    progress: bool,
) -> dict[int, Tensor]:
    """Embeds `[E]` by position, of the readable images."""
    embeds: dict[int, Tensor] = {}
    with tqdm(total=len(positions), desc="encode images", disable=not progress, leave=False) as bar:
        for good, batch, failed in images.embed(positions, memory=memory):
            embeds.update(zip(good, batch))
            for position, reason in failed:
                skipped.skip(f"unreadable image: {reason}", name_of(records, position))
            bar.update(len(good) + len(failed))
    return embeds


def _account(skipped: LoadReport, report: LoadReport | None, searched: Gallery, count: int, allowed: float) -> None:
    """Say what was left out; stop where nothing, or too little, is left."""
    skipped.images, skipped.captions = len(searched.positions), len(searched.captions)
    if report is not None:
        for reason, number in skipped.counts.items():
            names = skipped.names[reason]
            for index in range(number):
                report.skip(reason, names[min(index, len(names) - 1)])
    if not searched.positions:
        raise DataError(f"nothing to evaluate on: {count} records gave {skipped.summary()}")
    lost = count - len(searched.positions)
    if lost > allowed * count:
        limit = f"more than the allowed fraction {allowed}"
        raise DataError(f"{lost} of {count} images cannot be used, {limit}: {skipped.summary()}")


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


def _at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")

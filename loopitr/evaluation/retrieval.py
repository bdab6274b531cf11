"""Karpathy-style retrieval: every image against every caption with the dual head, the best candidates reranked."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopitr.data import DataError, LoadReport, Record, TokenCache, name_of
from loopitr.model import DualEncoder, ImageState, LoopITRModel
from loopitr.processing import LoopITRProcessor

from .gallery import EvaluationTransform, ImageTokens, TextTokens, gallery
from .nearest import Nearest, nearest
from .ranking import Ranking, candidate_ranks
from .report import recall_table

logger = logging.getLogger(__name__)
TEXT_BLOCK = 512  # captions whose tokens are padded together while reranking
HEADS = {"dual": "dual", "match": "match", "match_plus_similarity": "match + similarity"}


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """What was measured. `rankings` has `dual` and, where `k > 0`, `match` and `match_plus_similarity`.

    `seconds`: encode, rank, rerank, total. `num_pairs`: pairs scored by the fusion head, each once. `skipped`: images
    and captions left out. `truncated`: captions longer than the text backbone takes, scored by their beginning.
    """

    num_images: int
    num_captions: int
    k: int
    rankings: dict[str, Ranking]
    num_pairs: int
    seconds: dict[str, float]
    skipped: LoadReport
    truncated: int

    @property
    def pairs_per_second(self) -> float | None:
        return self.num_pairs / max(self.seconds["rerank"], 1e-9) if self.k else None

    @property
    def ceiling(self) -> dict[str, float] | None:
        """Percent of queries with a right answer among their `k` candidates: the most that reranking can reach."""
        return self.rankings["match"].ceiling() if self.k else None

    def mean_r1(self) -> dict[str, float]:
        """Mean of both directions' R@1 in percent, by head."""
        return {name: ranking.metrics()["mean_r1"] for name, ranking in self.rankings.items()}

    def to_json(self) -> dict[str, Any]:
        """What `metrics.json` holds; recalls in percent. With `k = 0` all that needs the fusion head is None."""
        return {
            "num_images": self.num_images,
            "num_captions": self.num_captions,
            "k": self.k,
            **{name: _head(self.rankings.get(name)) for name in HEADS},
            "ceiling": self.ceiling,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "pairs_per_second": self.pairs_per_second,
            "num_pairs": self.num_pairs,
            "skipped": dict(self.skipped.counts),
            "truncated_captions": self.truncated,
        }

    def table(self) -> str:
        """Markdown: recalls of each head, then size, ceiling, speed and time."""
        lines = [recall_table({HEADS[name]: ranking.metrics() for name, ranking in self.rankings.items()}), ""]
        lines.append(f"- gallery: {self.num_images} images, {self.num_captions} captions")
        if self.ceiling is not None:
            ceiling = f"i2t {self.ceiling['i2t']:.1f}, t2i {self.ceiling['t2i']:.1f}"
            lines.append(f"- ceiling of the {self.k} candidates that are reranked: {ceiling}")
            lines.append(f"- pairs/s: {self.pairs_per_second:.0f} ({self.num_pairs} pairs)")
        lines.append("- seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()))
        if self.skipped.skipped:
            lines.append("- skipped: " + ", ".join(f"{n} x {reason}" for reason, n in self.skipped.counts.items()))
        if self.truncated:
            lines.append(f"- captions cut to the text backbone's length: {self.truncated}")
        return "\n".join(lines)


def evaluation_transform(processor: LoopITRProcessor) -> EvaluationTransform:
    """PIL image -> `[3, S, S]`, as the processor does it; picklable."""
    return EvaluationTransform(processor)


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

    The model runs in eval mode under the caller's autocast, and comes back in the mode it had.

    Args:
        rerank: candidates per query; 0: dual only, which is all that a `DualEncoder` can do.
        batch_size: images (at most `image_block`) or captions encoded at a time.
        image_block: images whose tokens, keys and values are held at a time while reranking.
        pair_block: pairs scored at a time.
        device: where to move the model first; None: where it is.
        tokens: image tokens computed earlier for these records.
        token_memory: bytes of caption and image tokens that may be kept between encoding and reranking; what does not
            fit is computed again, block by block, so memory does not grow with the data.
        captions_per_image: use each image's first so many (COCO and Flickr evaluation: 5); None: all.
        max_images: evaluate on the first so many records.
        max_skipped_fraction: stop when more of the images than this are unreadable.
        report: counts what was skipped.

    Raises:
        DataError: nothing to evaluate on, or too much unreadable.
        ValueError: an option out of range, or `rerank` without a fusion head.
    """
    _check(rerank=rerank, batch_size=batch_size, image_block=image_block, pair_block=pair_block)
    _check(captions_per_image=captions_per_image, max_images=max_images)
    if rerank and isinstance(model, DualEncoder):
        raise ValueError(f"a DualEncoder has no fusion head to rerank with: use rerank 0, got {rerank}")
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    dual = model if isinstance(model, DualEncoder) else model.dual_encoder()
    skipped = LoadReport()
    started = time.perf_counter()
    count = len(records) if max_images is None else min(max_images, len(records))
    images = ImageTokens(
        dual,
        records,
        evaluation_transform(processor),
        cache=tokens,
        batch_size=min(batch_size, image_block),
        num_workers=num_workers,
    )
    with _evaluating(model), torch.inference_mode():
        # Captions first: an image without one is not worth decoding.
        candidates = gallery(records, range(count), skipped, captions_per_image=captions_per_image).positions
        embeds: dict[int, Tensor] = {}
        kept_captions = token_memory // 2 if rerank else 0
        with tqdm(total=len(candidates), desc="encode images", disable=not progress, leave=False) as bar:
            for positions, batch, failed in images.embed(candidates, memory=token_memory - kept_captions if rerank else 0):
                embeds.update(zip(positions, batch))
                for position, reason in failed:
                    skipped.skip(f"unreadable image: {reason}", name_of(records, position))
                bar.update(len(positions) + len(failed))
        unreadable = len(candidates) - len(embeds)
        searched = gallery(records, list(embeds), LoadReport(), captions_per_image=captions_per_image)
        skipped.images, skipped.captions = len(searched.positions), len(searched.captions)
        _account(skipped, report, unreadable, count, max_skipped_fraction)
        image_embeds = torch.stack(list(embeds.values()))  # [I, E]
        texts = TextTokens(model if rerank else dual, processor, searched.captions, batch_size=batch_size)
        with tqdm(total=len(searched.captions), desc="encode captions", disable=not progress, leave=False) as bar:
            for done in texts.embed(memory=kept_captions):
                bar.update(done)
        encoded = _now(image_embeds)

        place = image_embeds.device
        identities = searched.image_identities.to(place), searched.text_identities.to(place)
        found = nearest(image_embeds, texts.embeds, *identities, k=max(1, rerank))
        ranked = _now(image_embeds)
        rankings, num_pairs = {"dual": found.ranking}, 0
        if isinstance(model, LoopITRModel) and rerank:
            blocks = images.blocks(searched.positions, image_block)
            pairs = _candidate_pairs(found)
            scores = _score(model, blocks, texts, pairs, image_block, pair_block, progress)
            rankings.update(_reranked(found, pairs, scores, float(dual.scale), searched.image_identities,
                                      searched.text_identities))  # fmt: skip
            num_pairs = len(pairs)
    finished = _now(image_embeds)
    return RetrievalResult(
        num_images=len(searched.positions),
        num_captions=len(searched.captions),
        k=rerank,
        rankings=rankings,
        num_pairs=num_pairs,
        seconds={
            "encode": encoded - started,
            "rank": ranked - encoded,
            "rerank": finished - ranked if rerank else 0.0,
            "total": finished - started,
        },
        skipped=skipped,
        truncated=texts.truncated,
    )

"""The recall of each precision of an ONNX export, computed with onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from loopitr.data import DataError, DecodedImages, LoadReport, Record, name_of
from loopitr.evaluation.gallery import Gallery, account, build_gallery, distinct_images, evaluation_transform
from loopitr.evaluation.nearest import nearest
from loopitr.evaluation.ranking import Ranking
from loopitr.evaluation.report import recall_table
from loopitr.evaluation.reranking import candidate_pairs, scored_candidates
from loopitr.models.processing import LoopITRProcessor

from .onnx_running import CONFIG, FUSION, IMAGE, TEXT, OnnxModel

FULL = "fp32"


@dataclass(frozen=True)
class OnnxRecall:
    """The rankings by precision, then by kind: `dual`, and `reranked` if the export has a fusion head."""

    rankings: dict[str, dict[str, Ranking]]
    num_images: int
    num_captions: int

    def table(self) -> str:
        """The recalls of each precision, and the differences in mean R@1 to fp32, as Markdown."""
        rows = {f"{p} {kind}": ranking for p, kinds in self.rankings.items() for kind, ranking in kinds.items()}
        lines = [f"{self.num_images} images, {self.num_captions} captions", "", recall_table(rows), ""]
        for precision in self.rankings:
            if precision != FULL:
                lost = ", ".join(f"{kind} {points:+.2f}" for kind, points in self.change(precision).items())
                lines.append(f"{precision} against {FULL}, points of mean R@1: {lost}")
        return "\n".join(lines).rstrip()

    def change(self, precision: str) -> dict[str, float]:
        """The differences in points of mean R@1 between a precision and fp32."""
        full, own = self.rankings[FULL], self.rankings[precision]
        return {kind: float(own[kind].metrics()["mean_r1"]) - float(full[kind].metrics()["mean_r1"]) for kind in own}


def onnx_recall(
    folder: str | Path,
    processor: LoopITRProcessor,
    records: Sequence[Record],
    *,
    rerank: int = 16,
    batch_size: int = 32,
    num_workers: int = 2,
    max_skipped_fraction: float = 0.05,
    progress: bool = True,
) -> OnnxRecall:
    """Recalls of all images against all captions of `records`, in every precision of the export in `folder`.

    Args:
        processor: that of the exported model.
        rerank: the number of candidates per query for the fusion head; 0: evaluate the dual encoder alone.
        batch_size: the number of images or captions encoded at a time.

    Raises:
        OSError: there is no export, or a file is missing.
        ValueError: the export is only one tower.
        DataError: there is nothing to evaluate on, or too many images are unreadable.
    """
    config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    if not {IMAGE, TEXT} <= set(config["graphs"]):
        raise ValueError(f"{folder} holds one tower alone; recall needs both")
    rankings, gallery = {}, None
    reading = _Reading(records, processor, batch_size=batch_size, num_workers=num_workers, progress=progress)
    for precision in config["precisions"]:
        onnx = OnnxModel(folder, names=config["graphs"], precision=precision)
        image_embeds, gallery = reading.embeds(onnx, max_skipped_fraction)
        texts = reading.texts(onnx, gallery.captions, keep=bool(rerank) and FUSION in onnx.sessions)
        candidates = nearest(
            image_embeds, texts.embeds, gallery.image_identities, gallery.text_identities, k=max(1, rerank)
        )
        rankings[precision] = {"dual": candidates.ranking}
        if texts.tokens:
            pairs = candidate_pairs(candidates)
            scores = reading.scores(onnx, gallery, texts.tokens, pairs)
            scored = scored_candidates(candidates, pairs, scores, gallery, scale=config["scale"])
            rankings[precision]["reranked"] = scored.ranking(scored.reranking(config["similarity_weight"]))
    assert gallery is not None
    return OnnxRecall(rankings=rankings, num_images=len(gallery.positions), num_captions=len(gallery.captions))


@dataclass(frozen=True)
class _Texts:
    """`embeds [T, E]`, and the `tokens [L, D]` of each text without padding; the list is empty if not needed."""

    embeds: Tensor
    tokens: list[np.ndarray]


class _Reading:
    """Runs the graphs on records, in batches."""

    def __init__(
        self,
        records: Sequence[Record],
        processor: LoopITRProcessor,
        *,
        batch_size: int,
        num_workers: int,
        progress: bool,
    ) -> None:
        self.records, self.processor = records, processor
        self.batch_size, self.num_workers, self.progress = batch_size, num_workers, progress

    def embeds(self, onnx: OnnxModel, allowed: float) -> tuple[Tensor, Gallery]:
        """The embeds `[I, E]` of the readable images with captions, and their gallery."""
        skipped = LoadReport()
        distinct = distinct_images(self.records, len(self.records))
        captioned = build_gallery(self.records, distinct, skipped, captions_per_image=None).positions
        readable: set[int] = set()
        embeds: list[np.ndarray] = []
        for positions, pixels in self._images(captioned, skipped):
            embeds.append(onnx.encode_images(pixels)[0])
            readable.update(positions)
        left = [positions for positions in distinct if positions[0] in readable]
        gallery = build_gallery(self.records, left, LoadReport(), captions_per_image=None)
        account(skipped, None, gallery, len(distinct), allowed)
        return torch.from_numpy(np.concatenate(embeds)), gallery

    def texts(self, onnx: OnnxModel, captions: list[str], *, keep: bool) -> _Texts:
        """Encode captions, sorted by length so that they need little padding; `keep`: also return their tokens."""
        order = sorted(range(len(captions)), key=lambda index: len(captions[index]))
        embeds: list[np.ndarray] = []
        tokens: list[np.ndarray] = [np.empty(0)] * len(captions) if keep else []
        for start in self._bar(range(0, len(order), self.batch_size), "captions"):
            chosen = order[start : start + self.batch_size]
            inputs = self.processor(text=[captions[index] for index in chosen], return_tensors="np")
            outputs = onnx.encode_texts(inputs["input_ids"], inputs["attention_mask"])
            embeds.append(outputs[0])
            if keep:
                for index, own, mask in zip(chosen, outputs[1], inputs["attention_mask"], strict=True):
                    tokens[index] = own[: int(mask.sum())]
        in_order = torch.empty(len(order), embeds[0].shape[1])
        in_order[torch.tensor(order)] = torch.from_numpy(np.concatenate(embeds))
        return _Texts(in_order, tokens)

    def scores(self, onnx: OnnxModel, gallery: Gallery, texts: list[np.ndarray], pairs: Tensor) -> Tensor:
        """Match scores `[P]` of `pairs [P, 2]`, sorted by image; the images are encoded again.

        Raises:
            DataError: one of them cannot be read again.
        """
        scores: list[np.ndarray] = []
        ends = torch.searchsorted(pairs[:, 0].contiguous(), torch.arange(len(gallery.positions) + 1)).tolist()
        image, skipped = 0, LoadReport()
        for _, pixels in self._images(gallery.positions, skipped):
            for tokens in onnx.encode_images(pixels)[1]:
                own = [texts[index] for index in pairs[ends[image] : ends[image + 1], 1].tolist()]
                scores += [_match(onnx, tokens, own[i : i + 64]) for i in range(0, len(own), 64)]
                image += 1
        if image < len(gallery.positions):  # The scores would be those of other images.
            raise DataError(f"an image that was readable before is not any more: {skipped.summary()}")
        return torch.from_numpy(np.concatenate(scores)).float()

    def _images(self, positions: list[int], skipped: LoadReport) -> Iterator[tuple[list[int], np.ndarray]]:
        batches = [positions[start : start + self.batch_size] for start in range(0, len(positions), self.batch_size)]
        loader: Any = DataLoader(
            DecodedImages(self.records, evaluation_transform(self.processor)),
            batch_sampler=batches,
            num_workers=min(self.num_workers, len(batches)),
            collate_fn=list,
        )
        for items in self._bar(loader, "images"):
            good = [(position, x) for position, x in items if isinstance(x, Tensor)]
            for position, reason in items:
                if not isinstance(reason, Tensor):
                    skipped.skip(f"unreadable image: {reason}", name_of(self.records, position))
            if good:
                yield [position for position, _ in good], torch.stack([x for _, x in good]).numpy()

    def _bar(self, items: Any, what: str) -> Any:
        return tqdm(items, desc=what, disable=not self.progress, leave=False)


def _match(onnx: OnnxModel, image: np.ndarray, texts: list[np.ndarray]) -> np.ndarray:
    """Match scores `[t]` of an image's tokens `[N, Dv]` with texts `[L, D]`."""
    longest = max(len(text) for text in texts)
    padded = np.zeros((len(texts), longest, texts[0].shape[1]), np.float32)
    mask = np.zeros((len(texts), longest), np.int64)
    for row, text in enumerate(texts):
        padded[row, : len(text)], mask[row, : len(text)] = text, 1
    return onnx.match(image[None], padded, mask)[0]

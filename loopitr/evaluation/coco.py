"""ECCV Caption and CxC, benchmarks with more right answers for COCO's test images, by the package `eccv-caption`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from loopitr.data import DataError, Record, name_of
from loopitr.data.coco_ids import CocoImage

from .gallery import Gallery
from .nearest import Nearest
from .ranking import KS
from .reranking import CandidateScores

DEPTH = 50  # answers per query; ECCV Caption has up to 48 right ones
CAPTIONS = 5  # captions per image in the benchmark
INSTALL = 'eccv-caption is not installed: pip install "loopitr[eccv]"'
SIDES = ("i2t", "t2i")
# ECCV's mean average precision at R and R-precision are fractions from 0 to 1; recalls are in percent.
FRACTIONS = ("eccv_map_at_r", "eccv_rprecision")


class CocoBenchmarks:
    """ECCV Caption (arXiv 2204.03359) and CxC (arXiv 2004.15020), on COCO's Karpathy test split.

    Example (needs the extra `eccv`):

        coco = CocoBenchmarks(coco_images("dataset_coco.json", "test"))
        evaluate_retrieval(model, processor, records, EvaluationOptions(captions_per_image=5), coco=coco).coco["dual"]
    """

    def __init__(self, images: Mapping[str, CocoImage], metrics: Any = None) -> None:
        """
        Args:
            images: COCO's ids of the records by name (`loopitr.data.coco_ids.coco_images`).
            metrics: the ground truth, an `eccv_caption.Metrics`; None: the package's own.

        Raises:
            ModuleNotFoundError: the package is not installed.
        """
        self.images, self.metrics = images, _load_metrics() if metrics is None else metrics

    def figures(
        self,
        gallery: Gallery,
        records: Sequence[Record],
        widest: Nearest,
        candidates: Nearest,
        reranked: Mapping[str, CandidateScores],
    ) -> dict[str, dict[str, dict[str, float]]]:
        """The figures as ranking -> metric -> direction -> value.

        The metrics are `eccv_map_at_r` and `eccv_rprecision` (fractions), `eccv_r1`, `cxc_r1`, `cxc_r5` and `cxc_r10`
        (percent).

        Args:
            gallery: the images and captions that were ranked.
            records: have the names of the images.
            widest: each query's `DEPTH` most similar answers.
            candidates: the answers that were reranked.
            reranked: their scores by the name of the ranking.

        Raises:
            DataError: the gallery is not the whole split with five captions of each image.
        """
        images, captions = self.numbers(gallery, [name_of(records, position) for position in gallery.positions])
        orders = {"dual": (widest.captions.tolist(), widest.images.tolist())}
        for name, scores in reranked.items():
            orders[name] = (
                _reordered(candidates.captions, scores.captions, widest.captions),
                _reordered(candidates.images, scores.images, widest.images),
            )
        return {
            name: self._measured(
                {number: [captions[x] for x in row] for number, row in zip(images, of_images, strict=True)},
                {number: [images[x] for x in row] for number, row in zip(captions, of_captions, strict=True)},
            )
            for name, (of_images, of_captions) in orders.items()
        }

    def numbers(self, gallery: Gallery, names: list[str]) -> tuple[list[int], list[int]]:
        """COCO's ids of a gallery's images `[I]`, whose names are `names`, and of its captions `[T]`.

        Raises:
            DataError: the gallery does not have exactly the images and captions of the benchmarks.
        """
        coco_images = [self.images.get(name) or CocoImage(-1, {}) for name in names]
        unused = [{text: list(numbers) for text, numbers in image.captions.items()} for image in coco_images]
        images, captions = [image.number for image in coco_images], list[int]()
        for text, row in zip(gallery.captions, gallery.caption_rows.tolist(), strict=True):
            numbers = unused[row].get(text)
            captions.append(numbers.pop(0) if numbers else -1)
        truth = self.metrics.coco_gts
        for kind, present, required in (("images", images, truth["i2t"]), ("captions", captions, truth["t2i"])):
            missing, others = len(required.keys() - {*present}), sum(number not in required for number in present)
            if missing or others:
                raise DataError(
                    f"ECCV Caption and CxC are of COCO's {len(truth['i2t'])} Karpathy test images, {CAPTIONS} captions "
                    f"each (captions_per_image): {missing} of their {kind} are missing, {others} others are there"
                )
        return images, captions

    def _measured(self, i2t: dict[int, list[int]], t2i: dict[int, list[int]]) -> dict[str, dict[str, float]]:
        answers = {"i2t": i2t, "t2i": t2i}
        figures = dict(self.metrics.eccv_metrics(answers, "all"))
        figures |= {f"cxc_r{k}": self.metrics.cxc_recalls(answers, "all", K=k) for k in KS}
        return {
            name: {side: float(values[side]) * (1 if name in FRACTIONS else 100) for side in SIDES}
            for name, values in figures.items()
        }


def _load_metrics() -> Any:
    if importlib.util.find_spec("eccv_caption") is None:
        raise ModuleNotFoundError(INSTALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The import warns if ujson is not installed.
        from eccv_caption import Metrics

    return Metrics()


def _reordered(candidates: Tensor, scores: Tensor, widest: Tensor) -> list[list[int]]:
    """The candidates by descending score, followed by the rest of the most similar answers."""
    best = candidates.gather(1, scores.argsort(dim=1, descending=True, stable=True)).tolist()
    return [own + [x for x in rest if x not in {*own}] for own, rest in zip(best, widest.tolist(), strict=True)]


def coco_line(figures: Mapping[str, Mapping[str, float]]) -> str:
    """All figures of one ranking in one line."""
    labels = {"eccv_map_at_r": "ECCV mAP@R", "eccv_rprecision": "R-precision", "eccv_r1": "R@1"}
    labels |= {f"cxc_r{k}": f"{'CxC ' if k == KS[0] else ''}R@{k}" for k in KS}
    parts = []
    for name, label in labels.items():
        digits = 3 if name in FRACTIONS else 1
        parts.append(f"{label} " + ", ".join(f"{side} {figures[name][side]:.{digits}f}" for side in SIDES))
    return "; ".join(parts)

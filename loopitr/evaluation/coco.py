"""COCO's test images with more right answers than one: ECCV Caption and CxC, by the package `eccv-caption`."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loopitr.data import DataError
from loopitr.data.coco_ids import CocoImage

from .gallery import Gallery
from .nearest import Nearest
from .ranking import KS
from .reranking import CandidateScores

DEPTH = 50  # answers looked at: ECCV Caption has up to 48 right ones for a query
CAPTIONS = 5  # of each image are in the benchmark
INSTALL = 'eccv-caption is not installed: pip install "loopitr[eccv]"'
SIDES = ("i2t", "t2i")
# ECCV's mean average precision at R and R-precision are fractions, as everywhere here; recalls are in percent.
FRACTIONS = ("eccv_map_at_r", "eccv_rprecision")


def load_metrics() -> Any:
    """The ground truth: `eccv_caption.Metrics`.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    if importlib.util.find_spec("eccv_caption") is None:
        raise ModuleNotFoundError(INSTALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It says that it does without ujson.
        from eccv_caption import Metrics

    return Metrics()


@dataclass(frozen=True)
class CocoNumbers:
    """COCO's own numbers of a gallery's images `[I]` and captions `[T]`."""

    images: list[int]
    captions: list[int]


def number_gallery(gallery: Gallery, names: list[str], known: Mapping[str, CocoImage], metrics: Any) -> CocoNumbers:
    """The numbers of a gallery that is COCO's Karpathy test split, whole, with five captions of each image.

    Args:
        names: of the gallery's images, under which `known` has them.

    Raises:
        DataError: images or captions that the benchmark has are missing, or others are there.
    """
    images, captions = [known[name].number for name in names if name in known], list[int]()
    unused = {
        name: {text: list(numbers) for text, numbers in known[name].captions.items()} for name in names if name in known
    }
    for text, row in zip(gallery.captions, gallery.caption_rows.tolist(), strict=True):
        numbers = unused.get(names[row], {}).get(text)
        if not numbers:
            raise DataError(f"{names[row]}: the caption {text!r} has no sentid in the Karpathy file")
        captions.append(numbers.pop(0))
    for kind, here, wanted in (
        ("images", images, metrics.coco_gts["i2t"]),
        ("captions", captions, metrics.coco_gts["t2i"]),
    ):
        missing, more = len(wanted.keys() - {*here}), len({*here} - wanted.keys())
        if missing or more:
            raise DataError(
                f"ECCV Caption and CxC are of COCO's {len(metrics.coco_gts['i2t'])} Karpathy test images with "
                f"captions_per_image {CAPTIONS}: {missing} of their {kind} are missing, and {more} others are there"
            )
    return CocoNumbers(images, captions)


def coco_figures(
    widest: Nearest,
    candidates: Nearest,
    reranked: Mapping[str, CandidateScores],
    numbers: CocoNumbers,
    metrics: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """Ranking -> metric -> direction -> value: `eccv_map_at_r`, `eccv_rprecision` (fractions), `eccv_r1`, `cxc_r1`, ...

    Args:
        widest: each query's `DEPTH` most similar answers.
        candidates: those that were reranked; `reranked` has their scores by name.
        metrics: what `load_metrics` gave.
    """
    orders = {"dual": (widest.captions, widest.images)}
    for name, scores in reranked.items():
        orders[name] = (
            _reordered(candidates.captions, scores.captions, widest.captions),
            _reordered(candidates.images, scores.images, widest.images),
        )
    return {name: _figures(*order, numbers, metrics) for name, order in orders.items()}


def _reordered(candidates: Tensor, scores: Tensor, widest: Tensor) -> list[list[int]]:
    """The candidates by their scores, then what else is among the most similar."""
    best = candidates.gather(1, scores.argsort(dim=1, descending=True, stable=True)).tolist()
    return [own + [x for x in rest if x not in {*own}] for own, rest in zip(best, widest.tolist(), strict=True)]


def _figures(
    captions: Iterable[Any], images: Iterable[Any], numbers: CocoNumbers, metrics: Any
) -> dict[str, dict[str, float]]:
    found = {
        "i2t": {i: [numbers.captions[int(x)] for x in row] for i, row in zip(numbers.images, captions, strict=True)},
        "t2i": {c: [numbers.images[int(x)] for x in row] for c, row in zip(numbers.captions, images, strict=True)},
    }
    figures = dict(metrics.eccv_metrics(found, "all"))
    figures |= {f"cxc_r{k}": metrics.cxc_recalls(found, "all", K=k) for k in KS}
    return {
        name: {side: float(values[side]) * (1 if name in FRACTIONS else 100) for side in SIDES}
        for name, values in figures.items()
    }


def coco_line(figures: Mapping[str, Mapping[str, float]]) -> str:
    """All figures of one ranking in one line of text."""
    named = {"eccv_map_at_r": "ECCV mAP@R", "eccv_rprecision": "R-precision", "eccv_r1": "R@1"}
    named |= {f"cxc_r{k}": f"{'CxC ' if k == KS[0] else ''}R@{k}" for k in KS}
    parts = []
    for name, label in named.items():
        digits = 3 if name in FRACTIONS else 1
        parts.append(f"{label} " + ", ".join(f"{side} {figures[name][side]:.{digits}f}" for side in SIDES))
    return "; ".join(parts)

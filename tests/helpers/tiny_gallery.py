"""A processor, pictures and captions that fit the models of `support`."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from loopitr import LoopITRProcessor
from loopitr.data import LoadReport, Record, TokenCache, scene_vocabulary
from loopitr.evaluation import EvaluationOptions, RetrievalResult, TokenStorage, evaluate_retrieval
from loopitr.models.processing import image_processor, word_tokenizer


def tiny_processor(image_size: int = 32, max_length: int = 24) -> LoopITRProcessor:
    images = image_processor(image_size, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
    return LoopITRProcessor(images, word_tokenizer(scene_vocabulary(), max_length=max_length))


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth random picture: the tiny models tell these apart."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, format="JPEG")
    return buffer.getvalue()


def captions(seed: int, count: int) -> tuple[str, ...]:
    """Ragged texts of 2 to 9 known words."""
    rng, words = random.Random(seed), scene_vocabulary()
    return tuple(" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(count))


def tiny_records(count: int = 6, per_image: int = 3) -> list[Record]:
    """Identities are not positions, so that mixing them up shows."""
    return [
        Record(image=picture(i), captions=captions(i, per_image), identity=100 - 7 * i, name=f"{i}.jpg")
        for i in range(count)
    ]


def evaluate(
    model: Any,
    records: Sequence[Record],
    *,
    processor: LoopITRProcessor | None = None,
    tokens: TokenCache | None = None,
    report: LoadReport | None = None,
    **options: Any,
) -> RetrievalResult:
    """`evaluate_retrieval` with `EvaluationOptions` and, as `token_storage`, `token_dtype`, `token_memory` and
    `token_folder`, a `TokenStorage`; in this process and without progress bars where nothing else is asked for."""
    storage = {
        name: options.pop(f"token_{given}")
        for name, given in (("kind", "storage"), ("dtype", "dtype"), ("memory", "memory"), ("folder", "folder"))
        if f"token_{given}" in options
    }
    given = EvaluationOptions(**{"num_workers": 0, **options}, token_storage=TokenStorage(**storage))
    processor = processor or tiny_processor()
    return evaluate_retrieval(model, processor, records, given, tokens=tokens, report=report, progress=False)

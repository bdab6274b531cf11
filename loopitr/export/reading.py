"""What reads texts and images, saved apart from the processor that it belongs to."""

from __future__ import annotations

import copy
from pathlib import Path

from loopitr.models.processing import limit_length

from .source import Source


def save_tokenizer(source: Source, folder: Path) -> None:
    """The tokenizer, which cuts texts at the model's length whoever reads its files."""
    tokenizer = copy.deepcopy(source.processor.tokenizer)
    limit_length(tokenizer, tokenizer.model_max_length)
    _forget_processor(tokenizer, folder)


def save_image_processor(source: Source, folder: Path) -> None:
    """The image processor."""
    _forget_processor(copy.deepcopy(source.processor.image_processor), folder)


def _forget_processor(part: object, folder: Path) -> None:
    """Save without the name of the processor class, which `AutoProcessor` would look for and not find."""
    part._processor_class = None  # type: ignore[attr-defined]
    getattr(part, "init_kwargs", {}).pop("processor_class", None)
    part.save_pretrained(folder)  # type: ignore[attr-defined]

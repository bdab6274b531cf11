"""Saves a tokenizer or an image processor without the processor that it belongs to."""

from __future__ import annotations

import copy
from pathlib import Path

from loopitr.models.processing import limit_length

from .source import Source


def save_tokenizer(source: Source, folder: Path) -> None:
    """Save the tokenizer, with the model's maximum length in every file that holds a limit."""
    tokenizer = copy.deepcopy(source.processor.tokenizer)
    limit_length(tokenizer, tokenizer.model_max_length)
    _save_alone(tokenizer, folder)


def save_image_processor(source: Source, folder: Path) -> None:
    """Save the image processor."""
    _save_alone(copy.deepcopy(source.processor.image_processor), folder)


def _save_alone(part: object, folder: Path) -> None:
    """Save without the name of the processor class, which `AutoProcessor` would otherwise fail to find."""
    part._processor_class = None  # type: ignore[attr-defined]
    getattr(part, "init_kwargs", {}).pop("processor_class", None)
    part.save_pretrained(folder)  # type: ignore[attr-defined]

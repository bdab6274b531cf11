"""Checks that a processor fits its model: vocabulary, length of texts, image size."""

from __future__ import annotations

from typing import Any

from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import UNLIMITED, LoopITRProcessor, limit_length

# A model's vocabulary may be rounded up (ModernBERT: 50,368 for 50,280 tokens), by at most the larger of these.
SPARE_TOKENS, SPARE_SHARE = 128, 0.1


def check_sizes(model: LoopITRModel | DualEncoder, processor: LoopITRProcessor, source: str) -> None:
    """Check that a processor fits its model; a tokenizer without a maximum length gets that of the text backbone.

    Raises:
        ValueError: the tokenizer and the text backbone differ in vocabulary, the tokenizer allows longer texts, or the
            image processor gives images of another size.
    """
    tokenizer, text = processor.tokenizer, (model.dual if isinstance(model, LoopITRModel) else model).text
    size, words = int(model.config.text.get("vocab_size") or len(tokenizer)), len(tokenizer)
    if words > size or size - words > max(SPARE_TOKENS, SPARE_SHARE * size):
        raise ValueError(f"{source}: the tokenizer has {words} tokens, the text backbone {size}")
    if tokenizer.model_max_length >= UNLIMITED:
        limit_length(tokenizer, text.max_length)
    elif tokenizer.model_max_length > text.max_length:
        raise ValueError(
            f"{source}: the tokenizer cuts texts to {tokenizer.model_max_length} tokens, the text backbone takes "
            f"{text.max_length}"
        )
    wanted, given = model.config.vision["image_size"], _image_size(processor.image_processor)
    if given is not None and given != (wanted, wanted):
        raise ValueError(
            f"{source}: the image processor gives images of {given[0]} x {given[1]} pixels, the image backbone takes "
            f"{wanted} x {wanted}"
        )


def _image_size(images: Any) -> tuple[int, int] | None:
    """The height and width of an image processor's output; None: they depend on the image."""
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    if not size or not getattr(images, "do_resize", True):
        return None
    height, width = size.get("height"), size.get("width")
    return None if height is None or width is None else (int(height), int(width))

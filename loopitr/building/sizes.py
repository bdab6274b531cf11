"""Checks that a processor fits its model: vocabulary, length of texts, image size."""

from __future__ import annotations

from typing import Any

from PIL import Image

from loopitr.models.foreign import one_line_errors
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import UNLIMITED, LoopITRProcessor, limit_length
from loopitr.models.towers import ImageTower, TextTower

# A model's vocabulary may be rounded up (ModernBERT: 50,368 for 50,280 tokens), by at most the larger of these.
SPARE_TOKENS, SPARE_SHARE = 128, 0.1
LARGEST = 16  # The size to which images are resized before they are cropped is at most so many times that of the model.


def check_sizes(
    model: LoopITRModel | DualEncoder | ImageTower | TextTower, processor: LoopITRProcessor, source: str
) -> None:
    """Check that a processor fits its model; a tokenizer without a maximum length gets that of the text backbone.

    Of a single tower, only its own side is checked.

    Raises:
        ValueError: the tokenizer and the text backbone differ in vocabulary, the tokenizer allows longer texts, or the
            image processor gives images of another size.
    """
    if not isinstance(model, ImageTower):
        text = (model.dual if isinstance(model, LoopITRModel) else model).text
        _check_texts(processor.tokenizer, model.config, text.max_length, source)
    if not isinstance(model, TextTower):
        _check_images(processor.image_processor, model.config.vision["image_size"], source)


def _check_texts(tokenizer: Any, config: Any, max_length: int, source: str) -> None:
    size, words = int(config.text.get("vocab_size") or len(tokenizer)), len(tokenizer)
    if words > size or size - words > max(SPARE_TOKENS, SPARE_SHARE * size):
        raise ValueError(f"{source}: the tokenizer has {words} tokens, the text backbone {size}")
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ValueError(f"{source}: the tokenizer has a token {largest}, the text backbone {size} tokens")
    if tokenizer.model_max_length >= UNLIMITED:
        limit_length(tokenizer, max_length)
    elif tokenizer.model_max_length > max_length:
        raise ValueError(
            f"{source}: the tokenizer cuts texts to {tokenizer.model_max_length} tokens, the text backbone takes "
            f"{max_length}"
        )


def _check_images(images: Any, size: int, source: str) -> None:
    given = _image_size(images)
    if given is not None and given != (size, size):
        raise ValueError(
            f"{source}: the image processor gives images of {given[0]} x {given[1]} pixels, the image backbone takes "
            f"{size} x {size}"
        )
    sides = [side for sizes in (images.size, images.crop_size) if sizes for side in dict(sizes).values() if side]
    if sides and max(sides) > LARGEST * size:
        raise ValueError(f"{source}: the image processor resizes images to {max(sides)} pixels")
    with one_line_errors(f"the image processor of {source}"):  # A blank image shows whether it can be used.
        pixels = images(Image.new("RGB", (size, size)), return_tensors="pt")["pixel_values"]
    if not pixels.isfinite().all():
        raise ValueError(f"{source}: the image processor gives pixels that are not finite")


def _image_size(images: Any) -> tuple[int, int] | None:
    """The height and width of an image processor's output; None: they depend on the image."""
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    if not size or not getattr(images, "do_resize", True):
        return None
    height, width = size.get("height"), size.get("width")
    return None if height is None or width is None else (int(height), int(width))

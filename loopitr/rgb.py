"""A picture of any kind as an upright RGB one: the same for training, evaluation, search and a saved processor."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_RATIO = 200  # of the sides: to make the shorter one as long as a model wants would make the longer one endless


def to_rgb(image: Image.Image, *, shortest: int | None = None) -> Image.Image:
    """The image with 8 bits per channel, EXIF orientation applied, transparency put on white.

    With `shortest`, a JPEG file that was not read yet may come at a half, a quarter or an eighth of its size, as long
    as its shorter side keeps so many pixels.

    Raises:
        ValueError: no pixels, more than `PIL.Image.MAX_IMAGE_PIXELS`, one side more than 200 times the other, or an
            EPS file, which Pillow would run as a program; a decoder's own errors come as they are.

    Example:
        >>> from PIL import Image
        >>> from loopitr.rgb import to_rgb
        >>> to_rgb(Image.new("LA", (4, 3))).getpixel((0, 0))
        (255, 255, 255)
    """
    width, height = image.size
    if not width or not height:
        raise ValueError(f"zero size {width}x{height}")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError("too many pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"one side is more than {MAX_RATIO} times the other")
    if image.format == "EPS":
        raise ValueError("EPS, which is a program and no picture")
    if shortest is not None:
        # Both sides stay at least so long, and colours stay as they are, since no mode is asked for.
        image.draft(None, (shortest, shortest))
    image.load()
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception:  # A broken EXIF block says nothing about the pixels, which did load.
        pass
    if image.mode == "RGB" and "transparency" not in image.info:
        return image if type(image) is Image.Image else image.copy()
    if image.mode.startswith(("I", "F")):
        return _scale_to_8_bit(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit integers and floats as 8-bit ones. Pillow's own conversion clips at 255 and turns most of them white."""
    values = np.asarray(image, dtype=np.float32)
    values = np.where(np.isnan(values), np.float32(0), values)
    largest = values.max(where=np.isfinite(values), initial=0.0)
    if image.mode == "F":
        scale = 255.0 if largest <= 1.0 else 1.0
    else:
        scale = 1.0 / 257.0 if image.mode != "I" or largest > 255.0 else 1.0
    return Image.fromarray(np.clip(values * scale + 0.5, 0.0, 255.0).astype(np.uint8))

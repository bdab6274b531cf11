"""Converts any PIL image to an upright RGB image, the same way in training, evaluation, search and processors."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_RATIO = 200  # the largest ratio of the sides; resizing the shorter side would make the longer one huge
UNDERSHOOT = 0.15  # the part of white by which resampling may leave dark values below 0


def to_rgb(image: Image.Image, *, shortest: int | None = None) -> Image.Image:
    """The image in RGB with 8 bits per channel, with EXIF orientation applied and transparency on white.

    Args:
        shortest: a JPEG file that has not been read yet may be decoded at a half, a quarter or an eighth of its size,
            if its shorter side keeps at least this many pixels.

    Raises:
        ValueError: the image has no pixels, more than `PIL.Image.MAX_IMAGE_PIXELS`, one side more than 200 times the
            other, or integers or floats below 0, as after a normalisation to [-1, 1]; or it is an EPS file, which
            Pillow would run as a program. Errors of decoders are not changed.

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
        raise ValueError("EPS, which is a program and not a picture")
    if shortest is not None:
        # Both sides keep at least this length, and without a mode the colours do not change.
        image.draft(None, (shortest, shortest))
    image.load()
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception:  # A damaged EXIF block is ignored, since the pixels have been read.
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


def below_zero(lowest: float, largest: float) -> ValueError:
    """The error for an image with values below 0."""
    return ValueError(f"pixel values from {lowest:.2g} to {largest:.2g}, where 0 or more are wanted")


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    """Scale integers and floats to 8 bits; Pillow's conversion clips at 255, which makes most of them white."""
    values = np.asarray(image, dtype=np.float32)
    values = np.where(np.isnan(values), np.float32(0), values)
    largest = float(values.max(where=np.isfinite(values), initial=0.0))
    if image.mode == "F" and largest <= 2.0:  # Resampling leaves values a little above 1.
        white = 1.0
    elif image.mode.startswith("I;16"):
        white = 65535.0
    else:
        white = next((white for white in (255.0, 65535.0) if largest <= white), largest)
    lowest = float(values.min(where=np.isfinite(values), initial=0.0))
    if lowest < -UNDERSHOOT * white:
        raise below_zero(lowest, largest)
    return Image.fromarray(np.clip(values * (255.0 / white) + 0.5, 0.0, 255.0).astype(np.uint8))

"""Decodes anything that holds an image to an upright 8-bit RGB PIL image, or raises one clear error."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .records import DataError


class UnreadableImage(DataError):
    """An image that cannot be decoded; `name` and `reason` are kept for the log."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: unreadable image ({self.reason})"


def decode_image(
    image: str | Path | bytes | Image.Image, name: str | None = None, *, shortest: int | None = None
) -> Image.Image:
    """Decode a path, encoded bytes or PIL image to RGB, EXIF orientation applied, transparency put on white.

    With `shortest`, a JPEG file may come at a half, a quarter or an eighth of its size, which is faster, as long as its
    shorter side keeps so many pixels; everything else comes as without it.

    Raises `UnreadableImage` for a file that is missing, empty, truncated, no image, or too large
    (`PIL.Image.MAX_IMAGE_PIXELS`, the guard against decompression bombs).
    """
    if shortest is not None and shortest < 1:
        raise ValueError(f"shortest must be at least 1 pixel, got {shortest}")
    if name is None:
        name = str(image) if isinstance(image, (str, Path)) else "<bytes>" if isinstance(image, bytes) else repr(image)
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, name, None)  # `draft` would change the caller's image for good.
        if isinstance(image, bytes):
            if not image:
                raise UnreadableImage(name, "empty file")
            with Image.open(io.BytesIO(image)) as opened:
                return _to_rgb(opened, name, shortest)
        path = Path(image)
        if path.is_file() and path.stat().st_size == 0:
            raise UnreadableImage(name, "empty file")
        with Image.open(path) as opened:
            return _to_rgb(opened, name, shortest)
    except UnreadableImage:
        raise
    except Exception as error:  # Decoders raise nearly anything on foreign bytes, and all of it means unreadable.
        raise UnreadableImage(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not a known image format"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    text = (str(error).splitlines() or [""])[0]
    # Pillow's message counts bytes, while one short reason lets the log group such files.
    return "truncated" if "truncated" in text.lower() else text or type(error).__name__


def _to_rgb(image: Image.Image, name: str, shortest: int | None) -> Image.Image:
    width, height = image.size
    if not width or not height:
        raise UnreadableImage(name, f"zero size {width}x{height}")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise UnreadableImage(name, "too many pixels")
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
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    if image.mode == "F":
        scale = 255.0 if values.max() <= 1.0 else 1.0
    else:
        scale = 1.0 / 257.0 if image.mode != "I" or values.max() > 255.0 else 1.0
    return Image.fromarray(np.clip(values * scale + 0.5, 0.0, 255.0).astype(np.uint8))

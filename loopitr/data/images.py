"""Decodes a file, bytes or a PIL image to an upright 8-bit RGB PIL image, or raises one kind of error."""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from loopitr.rgb import to_rgb

from .records import DataError, printable

HEAD = 4096  # bytes at the beginning of a file
PPM_HEADER = re.compile(rb"P[1-7](?:[\s\d]|#[^\r\n]*)*")
COMMENT = re.compile(rb"#[^\r\n]*")


class UnreadableImage(DataError):
    """An image that cannot be decoded. It has `name` and `reason`, for logs."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.name)}: unreadable image ({self.reason})"


def decode_image(
    image: str | Path | bytes | Image.Image, name: str | None = None, *, shortest: int | None = None
) -> Image.Image:
    """Decode a path, encoded bytes or a PIL image to RGB, with EXIF orientation applied and transparency on white.

    Args:
        name: the name in errors; None: the path.
        shortest: a JPEG file may be decoded at a half, a quarter or an eighth of its size, which is faster, if its
            shorter side keeps at least this many pixels.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, not an image, not a regular file, or in a format that
            is a program (EPS); or the image has more than `PIL.Image.MAX_IMAGE_PIXELS` (the limit against
            decompression bombs), or one side is far longer than the other.
        ValueError: `shortest` is below 1.
    """
    if shortest is not None and shortest < 1:
        raise ValueError(f"shortest must be at least 1 pixel, got {shortest}")
    if name is None:
        name = str(image) if isinstance(image, (str, Path)) else "<bytes>" if isinstance(image, bytes) else repr(image)
    try:
        if isinstance(image, Image.Image):
            return to_rgb(image)  # Without `shortest`, since `draft` would change the caller's image.
        if isinstance(image, bytes):
            if not image:
                raise UnreadableImage(name, "empty file")
            _check_head(image[:HEAD], name)
            with Image.open(io.BytesIO(image)) as opened:
                return to_rgb(opened, shortest=shortest)
        status = os.stat(image)
        if not stat.S_ISREG(status.st_mode):  # Reading a pipe or a device may never end.
            raise UnreadableImage(name, "Is a directory" if stat.S_ISDIR(status.st_mode) else "not a file")
        if not status.st_size:
            raise UnreadableImage(name, "empty file")
        with open(image, "rb") as file:
            _check_head(file.read(HEAD), name)
        with Image.open(image) as opened:
            return to_rgb(opened, shortest=shortest)
    except UnreadableImage:
        raise
    except Exception as error:  # On damaged files decoders raise errors of many kinds.
        raise UnreadableImage(name, _reason(error)) from error


def _check_head(head: bytes, name: str) -> None:
    """Pillow reads the comments of a PPM byte by byte, however long they are."""
    if head[:1] == b"P" and PPM_HEADER.fullmatch(head) and sum(map(len, COMMENT.findall(head))) > HEAD // 2:
        raise UnreadableImage(name, "a header of comments")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not a known image format"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    # Reasons must not differ from file to file, so that logs can count them: `strerror` does not name the file, and
    # Pillow's message on truncated files, which counts bytes, is replaced.
    text = (str(getattr(error, "strerror", None) or error).splitlines() or [""])[0]
    return "truncated" if "truncated" in text.lower() else text or type(error).__name__

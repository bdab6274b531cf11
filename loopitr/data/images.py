"""Decodes anything that holds an image to an upright 8-bit RGB PIL image, or raises one clear error."""

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
    """An image that cannot be decoded; `name` and `reason` are kept for the log."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.name)}: unreadable image ({self.reason})"


def decode_image(
    image: str | Path | bytes | Image.Image, name: str | None = None, *, shortest: int | None = None
) -> Image.Image:
    """Decode a path, encoded bytes or PIL image to RGB, EXIF orientation applied, transparency put on white.

    With `shortest`, a JPEG file may come at a half, a quarter or an eighth of its size, which is faster, as long as its
    shorter side keeps so many pixels; everything else comes as without it.

    Raises `UnreadableImage` for a file that is missing, empty, truncated, no image, too large
    (`PIL.Image.MAX_IMAGE_PIXELS`, the guard against decompression bombs), far longer than wide, or in a format that is
    a program (EPS); and for what is no file at all, such as a pipe or a device, which is not opened.
    """
    if shortest is not None and shortest < 1:
        raise ValueError(f"shortest must be at least 1 pixel, got {shortest}")
    if name is None:
        name = str(image) if isinstance(image, (str, Path)) else "<bytes>" if isinstance(image, bytes) else repr(image)
    try:
        if isinstance(image, Image.Image):
            return to_rgb(image)  # `draft` would change the caller's image for good.
        if isinstance(image, bytes):
            if not image:
                raise UnreadableImage(name, "empty file")
            _check_head(image[:HEAD], name)
            with Image.open(io.BytesIO(image)) as opened:
                return to_rgb(opened, shortest=shortest)
        status = os.stat(image)
        if not stat.S_ISREG(status.st_mode):  # A pipe would be waited for, and some devices never end.
            raise UnreadableImage(name, "Is a directory" if stat.S_ISDIR(status.st_mode) else "not a file")
        if not status.st_size:
            raise UnreadableImage(name, "empty file")
        with open(image, "rb") as file:
            _check_head(file.read(HEAD), name)
        with Image.open(image) as opened:
            return to_rgb(opened, shortest=shortest)
    except UnreadableImage:
        raise
    except Exception as error:  # Decoders raise nearly anything on foreign bytes, and all of it means unreadable.
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
    # What an operating system says of a file names the file too, and one reason is to stand for many.
    text = (str(getattr(error, "strerror", None) or error).splitlines() or [""])[0]
    # Pillow's message counts bytes, while one short reason lets the log group such files.
    return "truncated" if "truncated" in text.lower() else text or type(error).__name__

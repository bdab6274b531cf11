"""Small pictures as text, for pages that must not refer to files."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from loopitr.data import decode_image

SIDE = 160  # pixels


def thumbnail(image: str | Path | bytes | Image.Image, name: str | None = None, *, side: int = SIDE) -> str:
    """A JPEG of at most `side x side` pixels as a data URI, without anything of the file but its pixels.

    Raises:
        UnreadableImage: the image cannot be opened; `name` is what the error calls it.

    Example:
        >>> from PIL import Image
        >>> from loopitr.evaluation.thumbnails import thumbnail
        >>> thumbnail(Image.new("RGB", (640, 480), "red"))[:30]
        'data:image/jpeg;base64,/9j/4AA'
    """
    small = decode_image(image, name, shortest=side).copy()
    small.thumbnail((side, side))
    small.info.clear()  # The file's own comment, profile and place would be written too.
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

"""Small images as data URIs, for self-contained pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from loopitr.data import decode_image

SIDE = 160  # pixels


def thumbnail(image: str | Path | bytes | Image.Image, name: str | None = None, *, side: int = SIDE) -> str:
    """A data URI of a JPEG of at most `side x side` pixels, without the file's metadata.

    Raises:
        UnreadableImage: the image cannot be opened; the error calls it `name`.

    Example:
        >>> from PIL import Image
        >>> from loopitr.evaluation.thumbnails import thumbnail
        >>> thumbnail(Image.new("RGB", (640, 480), "red"))[:30]
        'data:image/jpeg;base64,/9j/4AA'
    """
    small = decode_image(image, name, shortest=side).copy()
    small.thumbnail((side, side))
    small.info.clear()  # Otherwise the file's comment, colour profile and location would be written too.
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

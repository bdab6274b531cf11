"""Sizes of image files in bytes: the cheap sign that an image was replaced by another under the same name."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .records import LazyRecords, Record

ABSENT = -1


def file_size(path: str | Path) -> int:
    """The size of a regular file in bytes; `ABSENT` if there is none.

    Pipes and devices count as absent, since reading them may never end.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ABSENT
    return status.st_size if stat.S_ISREG(status.st_mode) else ABSENT


def image_sizes(records: Sequence[Record]) -> np.ndarray | None:
    """The sizes in bytes `[R]` of the images' files or encoded bytes, `ABSENT` where there are none; no image is read.

    Each file costs one `stat`. Files are not told apart by their times, which copying changes. A file that is replaced
    by another of exactly the same size goes unnoticed, as it may with formats that do not compress. None: the source
    does not know the sizes, as the built-in scenes, which are rendered.

    Example:
        >>> from loopitr.data import Record
        >>> from loopitr.data.image_sizes import image_sizes
        >>> image_sizes([Record(image=b"abc", captions=("x",)), Record(image="no/such/file.jpg", captions=("y",))])
        array([ 3, -1])
    """
    if isinstance(records, LazyRecords):
        return records.image_sizes()
    return np.array([_size(records[index].image) for index in range(len(records))], dtype=np.int64)


def _size(image: str | Path | bytes | Image.Image) -> int:
    if isinstance(image, bytes):
        return len(image)
    return ABSENT if isinstance(image, Image.Image) else file_size(image)

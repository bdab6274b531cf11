"""Checks the images and texts that a user passes, one or many, and names each of them for errors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loopitr.data import LazyRecords, Record

ImageInput = str | Path | bytes | Image.Image | np.ndarray | Tensor
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
MOST_ITEMS = 2_000_000  # of an iterator, which may have no end


class GivenImages(LazyRecords):
    """Images as records without captions. Each is opened when it is read, and named by its path or its position.

    `positions` are the numbers of the images in errors; None: 0, 1, 2, ...
    """

    def __init__(self, images: Sequence[ImageInput], positions: Sequence[int] | None = None) -> None:
        self.images, self.positions = images, range(len(images)) if positions is None else positions

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Record:
        image = self.images[index]
        opened = picture_of(image) if isinstance(image, (np.ndarray, Tensor)) else image
        return Record(image=opened, captions=(), identity=index, name=self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return ()

    def identity(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        image = self.images[index]
        return str(image) if isinstance(image, (str, Path)) else f"image {self.positions[index]}"

    @property
    def are_files(self) -> bool:
        """Whether all are paths or bytes, so that other processes may open them.

        Two processes that read from one open PIL image would get each other's bytes.
        """
        return all(isinstance(image, (str, Path, bytes)) for image in self.images)


def given_images(images: Any) -> tuple[GivenImages, bool]:
    """The images of a list, or one image, and whether it was one.

    An image is a path, the bytes of a file, a PIL image, or an array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]` of
    bool, uint8, uint16, or floats from 0 to 1.

    Raises:
        ValueError: an item is not an image (the error has its position), or the images are a set, which has no order.
    """
    alone = is_one(images)
    items = [images] if alone else listed(images, "images", "paths, bytes, PIL images or arrays")
    for index, image in enumerate(items):
        _check_image(image, f"image {index}")
    return GivenImages(items), alone


def given_texts(texts: Any) -> tuple[list[str], bool]:
    """The texts of a list, or one text, and whether it was one.

    Raises:
        ValueError: an item is not a text, is blank, or is not valid Unicode; the error has its position.
    """
    alone = isinstance(texts, str)
    items = [texts] if alone else listed(texts, "texts", "str")
    for index, text in enumerate(items):
        if not isinstance(text, str):
            raise ValueError(f"text {index} must be a str, got {type(text).__name__}")
        if not text.strip():
            raise ValueError(f"text {index} is empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {index} is not valid Unicode: {text!r}") from error
    return items, alone


@dataclass(frozen=True, kw_only=True)
class GivenPairs:
    """Pairs of images and texts.

    Attributes:
        images, texts: the distinct images (by object or path) and texts.
        pairs: (image, text) indices into them, in the order of the given pairs.
        alone: whether one pair was given instead of a list.
    """

    images: GivenImages
    texts: list[str]
    pairs: list[tuple[int, int]]
    alone: bool


def given_pairs(pairs: Any) -> GivenPairs:
    """The pairs of a list of (text, image), or one pair.

    A pair may also be (image, text), as sentence-transformers' evaluators give it for image queries, if the image is
    not a str, which could be a text.

    Raises:
        ValueError: an item is not a pair of a text and an image; the error has its position.
    """
    items = listed(pairs, "pairs", "(text, image)")
    alone = len(items) == 2 and isinstance(pairs, (list, tuple)) and not isinstance(items[0], (list, tuple))
    items = [_text_first(pair) for pair in ([items] if alone else items)]
    for index, pair in enumerate(items):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
            got = [type(part).__name__ for part in pair] if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise ValueError(f"pair {index} must be (text, image), got {got}")
    texts, _ = given_texts([text for text, _ in items])
    images, _ = given_images([image for _, image in items])
    text_rows: dict[str, int] = {}
    image_rows: dict[str | int, int] = {}
    first: list[int] = []  # the position of the first pair of each image
    rows = []
    for index, (text, image) in enumerate(zip(texts, images.images)):
        row = image_rows.setdefault(str(image) if isinstance(image, (str, Path)) else id(image), len(first))
        if row == len(first):
            first.append(index)
        rows.append((row, text_rows.setdefault(text, len(text_rows))))
    unique = GivenImages([images.images[index] for index in first], first)
    return GivenPairs(images=unique, texts=[*text_rows], pairs=rows, alone=alone)


def _text_first(pair: Any) -> Any:
    swapped = isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[1], str)
    return (pair[1], pair[0]) if swapped and not isinstance(pair[0], str) else pair


def listed(items: Any, name: str, wanted: str) -> list[Any]:
    """The items of a list or any other ordered iterable.

    Raises:
        ValueError: `items` is text, bytes, a dictionary or a set, is not iterable, or seems to have no end.
    """
    unlisted = isinstance(items, (str, bytes, Mapping, Set)) or not isinstance(items, Iterable)
    if unlisted or getattr(items, "ndim", 1) == 0:
        raise ValueError(f"{name} must be a list of {wanted}, got {type(items).__name__}")
    taken = list(islice(items, MOST_ITEMS + 1)) if not hasattr(items, "__len__") else list(items)
    if len(taken) > MOST_ITEMS and not hasattr(items, "__len__"):
        raise ValueError(f"{name} has more than {MOST_ITEMS:,} items and perhaps no end: pass a list")
    return taken


def is_one(items: Any) -> bool:
    """Whether this is one text or image, and not a list of them."""
    if isinstance(items, (np.ndarray, Tensor)):
        return items.ndim in (2, 3)
    return isinstance(items, (str, Path, bytes, Image.Image))


def is_text(item: Any) -> bool:
    """Whether this is a text and not an image.

    A str is the path of an image if it has the suffix of an image file, or is the path of an existing file in a folder.
    """
    if not isinstance(item, str):
        return False
    ends_as_image = os.path.splitext(item)[1].lower() in Image.registered_extensions()
    return not (ends_as_image or (os.sep in item and os.path.isfile(item)))


def kind_of(candidates: Sequence[Any]) -> str:
    """`text` or `image`, the kind of all candidates; `text` if there are none.

    Raises:
        ValueError: some are texts and some images.
    """
    kinds = ["text" if is_text(candidate) else "image" for candidate in candidates]
    if len({*kinds}) > 1:
        other = next(place for place, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(f"candidates must be all texts or all images: 0 is {kinds[0]}, {other} is {kinds[other]}")
    return kinds[0] if kinds else "text"


def picture_of(pixels: np.ndarray | Tensor) -> Image.Image:
    """A checked array or tensor as an 8-bit PIL image; 16 bits and floats are rounded as for files."""
    values = _array(pixels)
    if values.ndim == 3 and values.shape[-1] not in CHANNELS:
        values = np.moveaxis(values, 0, -1)  # [H, W, C]
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]  # [H, W]
    if values.dtype != np.uint8:
        scale = 1 / 257 if values.dtype == np.uint16 else 255.0
        values = (values.astype(np.float32) * scale + 0.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values))


def _array(pixels: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(pixels, np.ndarray):
        return pixels
    pixels = pixels.detach().cpu()
    return (pixels.float() if pixels.is_floating_point() else pixels).numpy()


def _check_image(image: Any, name: str) -> None:
    if isinstance(image, (str, Path, bytes, Image.Image)):
        return
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(f"{name} must be a path, bytes, a PIL image or an array, got {type(image).__name__}")
    pixels, shape = _array(image), list(image.shape)
    has_channels = pixels.ndim == 3 and (shape[0] in CHANNELS or shape[-1] in CHANNELS)
    if not pixels.size or not (pixels.ndim == 2 or has_channels):
        raise ValueError(f"{name} must be an array [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, got {shape}")
    if pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # This is also true for NaN.
            raise ValueError(f"{name}: floating-point pixels must be from 0 to 1, got {low:.4g} to {high:.4g}")
    elif pixels.dtype not in (np.bool_, np.uint8, np.uint16):
        raise ValueError(f"{name} must have pixels of bool, uint8, uint16 or floats, got {pixels.dtype}")


def floating_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating-point dtype given as such or by its name; None stays None.

    Raises:
        ValueError: it is not a floating-point type.
    """
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type such as float32, bfloat16 or float16, got {dtype}")
    return known


def vector_rows(vectors: Any) -> Tensor:
    """A tensor or an array, `[n, E]` or `[E]`, as a float32 tensor `[n, E]` on the CPU.

    Raises:
        ValueError: the vectors have integers or another shape.
    """
    if isinstance(vectors, Tensor):
        rows = vectors.detach().cpu()
    elif isinstance(vectors, (np.ndarray, list, tuple)):
        values = np.asarray(vectors)
        if values.dtype.kind not in "fiub":
            raise ValueError(f"vectors must be numbers, got {values.dtype}")
        rows = torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    else:
        raise ValueError(f"vectors must be an array, a tensor or a list, got {type(vectors).__name__}")
    if not rows.is_floating_point():
        raise ValueError(f"similarity takes vectors of floats, got {rows.dtype}: quantized ones are for an index")
    if rows.ndim not in (1, 2):
        raise ValueError(f"vectors must be [n, E] or [E], got {list(rows.shape)}")
    return torch.atleast_2d(rows).float()


def products_of(a: Any, b: Any) -> Tensor:
    """Dot products `[n, m]` of `[n, E]` and `[m, E]`; a vector `[E]` counts as one row.

    Raises:
        ValueError: these are no vectors, they differ in width, or the products do not fit in memory.
    """
    first, second = vector_rows(a), vector_rows(b)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"vectors must be equally wide, got {first.shape[1]} and {second.shape[1]} dimensions")
    try:
        return first @ second.T
    except RuntimeError as error:
        raise ValueError(f"{len(first)} x {len(second)} similarities do not fit in memory") from error

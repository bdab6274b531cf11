"""The record type that every source yields."""

from __future__ import annotations

import hashlib
import operator
from abc import abstractmethod
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

INT64 = range(-(2**63), 2**63)  # what a tensor of identities can hold


class DataError(ValueError):
    """An error in the user's data, explained in one line; recipes print it without a traceback."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image with all of its captions. A list of records is a data set wherever records are expected.

    Args:
        image: a path, the bytes of an image file, or a PIL image.
        captions: a tuple of texts.
        identity: an integer, equal for records whose captions are right for each other's image; None: a hash of the
            image or its path.
        name: the name in logs; None: the path, or else the hash.

    Raises:
        DataError: an argument has another type, or a PIL image cannot be read to be hashed.

    Example:
        >>> from PIL import Image
        >>> from loopitr.data import CaptionDataset, Record, TrainTransform
        >>> red = Record(image=Image.new("RGB", (40, 30), "red"), captions=("a red card", "red paper"))
        >>> photo = Record(image="photos/dog.jpg", captions=("a dog",), identity=7)
        >>> photo.name
        'photos/dog.jpg'
        >>> dataset = CaptionDataset([red, photo], transform=TrainTransform(32, (0.5,) * 3, (0.5,) * 3))
        >>> dataset[0]["pixel_values"].shape
        torch.Size([3, 32, 32])
    """

    image: str | Path | bytes | Image.Image
    captions: tuple[str, ...]
    # `__post_init__` replaces None by the default, so these two are never None afterwards.
    identity: int = None  # type: ignore[assignment]
    name: str = None  # type: ignore[assignment]
    split: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.image, (str, Path, bytes, Image.Image)):
            raise DataError(
                f"a record's image must be a path, encoded bytes or a PIL image, got {type(self.image).__name__}"
            )
        if isinstance(self.captions, str):
            raise DataError(f"a record's captions must be a tuple of texts, got the text {self.captions!r}")
        if not isinstance(self.captions, Collection):
            raise DataError(f"a record's captions must be a tuple of texts, got {type(self.captions).__name__}")
        for caption in self.captions:
            if not isinstance(caption, str):
                raise DataError(f"a record's captions must be texts, got {type(caption).__name__} {caption!r}")
        if self.identity is not None and not _is_int64(self.identity):
            raise DataError(f"a record's identity must be an integer of 64 bits, got {_short(self.identity)}")
        is_path = isinstance(self.image, (str, Path))
        if self.identity is None or (self.name is None and not is_path):
            digest = _image_hash(self.image)
            if self.identity is None:
                object.__setattr__(self, "identity", digest)
            if self.name is None and not is_path:
                object.__setattr__(self, "name", f"image {digest & 0xFFFFFFFFFFFFFFFF:016x}")
        if self.name is None:
            object.__setattr__(self, "name", str(self.image))


def _is_int64(value: Any) -> bool:
    try:
        return operator.index(value) in INT64
    except TypeError:
        return False


def _short(value: Any) -> str:
    text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else repr(value)
    return text if len(text) < 100 else text[:100] + "..."


def printable(name: str) -> str:
    """A name with its unprintable characters escaped, since file names may contain line breaks.

    Example:
        >>> from loopitr.data.records import printable
        >>> printable("two\\nlines.jpg")
        'two\\\\nlines.jpg'
    """
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _image_hash(image: str | Path | bytes | Image.Image) -> int:
    """A hash of a path as written, of encoded bytes, or of a PIL image's mode, size and pixels."""
    if isinstance(image, bytes):
        return stable_hash(image)
    if not isinstance(image, Image.Image):
        return stable_hash(str(image))
    try:
        return stable_hash(f"{image.mode} {image.size} ".encode() + image.tobytes())
    except Exception as error:  # A PIL image may be decoded only now, and decoders raise errors of many kinds.
        raise DataError(f"a PIL image that cannot be read needs a name and an identity ({error})") from error


class LazyRecords(Sequence[Record]):
    """A sequence of records whose images are read on access, with captions, names and identities without images."""

    @abstractmethod
    def read(self, index: int) -> Record:
        """The record at `index`, which is in range."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of that record, without reading its image."""

    @abstractmethod
    def identity(self, index: int) -> int:
        """The identity of that record, without reading its image."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of that record, without reading its image."""

    def split_key(self, index: int) -> str:
        """What decides whether `val_fraction` holds that record out: equal for records of one image, the same wherever
        the data are."""
        return self.name(index)

    @property
    def fingerprint(self) -> str:
        """A text that distinguishes sources whose records have the same names; empty if names are enough."""
        return ""

    def image_sizes(self) -> np.ndarray | None:
        """The sizes of all images in bytes `[R]`, -1 where unknown; None if none is known.

        They show whether an image was replaced under its name since a cache was built or a run was started.
        """
        return None

    def image_key(self, index: int) -> Hashable:
        """A value that is equal for records that show the same image; by default, every record has its own image."""
        return index

    def caption_count(self, index: int) -> int:
        """The number of captions of that record."""
        return len(self.captions(index))

    def relevance(self, positions: Sequence[int]) -> Tensor | None:
        """The graded relevance `[n, n]` in [0, 1] among the n images at `positions`; None if it is unknown."""
        return None

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self.read(i) for i in range(*index.indices(len(self)))]
        position = operator.index(index)
        position += len(self) if position < 0 else 0
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.read(position)


def captions_of(records: Sequence[Record], index: int) -> tuple[str, ...]:
    """The captions of one record, without reading its image if the source allows that."""
    return records.captions(index) if isinstance(records, LazyRecords) else records[index].captions


def caption_count(records: Sequence[Record], index: int) -> int:
    """The number of captions of one record, without reading its image if the source allows that."""
    return records.caption_count(index) if isinstance(records, LazyRecords) else len(records[index].captions)


def identity_of(records: Sequence[Record], index: int) -> int:
    """The identity of one record, without reading its image if the source allows that."""
    return records.identity(index) if isinstance(records, LazyRecords) else records[index].identity


def image_key_of(records: Sequence[Record], index: int) -> Hashable:
    """A value that is equal for records of one sequence that show the same image.

    Files are known by their paths, and not read; encoded bytes and PIL images by their content.
    """
    if isinstance(records, LazyRecords):
        return records.image_key(index)
    try:
        return _image_hash(records[index].image)
    except DataError:  # An image that cannot be read is like no other.
        return ("unreadable", index)


def name_of(records: Sequence[Record], index: int) -> str:
    """The name of one record, without reading its image if the source allows that."""
    return records.name(index) if isinstance(records, LazyRecords) else records[index].name


def split_key_of(records: Sequence[Record], index: int) -> str:
    """What decides whether `val_fraction` holds a record out."""
    return records.split_key(index) if isinstance(records, LazyRecords) else records[index].name


def relevance_of(records: Sequence[Record], positions: Sequence[int]) -> Tensor | None:
    """The graded relevance `[n, n]` among the n images at `positions`; None if the records have none."""
    return records.relevance(positions) if isinstance(records, LazyRecords) else None


def stable_hash(value: str | bytes | memoryview) -> int:
    """A signed 64-bit hash that is the same in every process, unlike Python's own, which is salted."""
    # File names that are not UTF-8 contain surrogates.
    data = value.encode(errors="surrogatepass") if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)

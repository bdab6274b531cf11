"""The one record type that every source yields, and the account of what was skipped on the way."""

from __future__ import annotations

import hashlib
import operator
import unicodedata
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


INT64 = range(-(2**63), 2**63)  # what a tensor of identities can hold
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode's control and format characters, and its spaces


class DataError(ValueError):
    """Something about the user's data that one line can explain; recipes print it without a traceback."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image with all of its captions. A list of these is a data set: whatever takes records takes such a list.

    `image` is a path, the bytes of an image file, or a PIL image. Records of equal `identity` show the same thing, so
    that the captions of one are right for the other; left out, it is a hash of the image (of its path, if it is one).
    `name` is what logs call the record: by default the path, or else that hash.

    Raises:
        DataError: an image of another type, captions that are one text or no texts, an identity that is no integer of
            64 bits, or a PIL image that has to be hashed and cannot be read.

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
    # None is no value of these two: it stands for an argument left out until `__post_init__` puts the default there.
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
    """A name as one line of a log: names of files may hold anything but `/`, line breaks and half characters too.

    Example:
        >>> from loopitr.data.records import printable
        >>> printable("two\\nlines.jpg")
        'two\\\\nlines.jpg'
    """
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _image_hash(image: str | Path | bytes | Image.Image) -> int:
    """A hash of a path as it is written, of encoded bytes, or of a PIL image's mode, size and pixels."""
    if isinstance(image, bytes):
        return stable_hash(image)
    if not isinstance(image, Image.Image):
        return stable_hash(str(image))
    try:
        return stable_hash(f"{image.mode} {image.size} ".encode() + image.tobytes())
    except Exception as error:  # A PIL image may be a file that is decoded only now, and any decoder's error can come.
        raise DataError(f"a PIL image that cannot be read needs a name and an identity ({error})") from error


class LazyRecords(Sequence[Record]):
    """A sequence whose images are made or read on access; captions, names and identities come without reading any."""

    @abstractmethod
    def read(self, index: int) -> Record:
        """The record at `index`, which is in range."""

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of that record, without its image."""

    @abstractmethod
    def identity(self, index: int) -> int:
        """The identity of that record, without its image."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of that record, without its image."""

    @property
    def fingerprint(self) -> str:
        """Distinguishes sources whose records have the same names; empty where names say enough."""
        return ""

    def caption_count(self, index: int) -> int:
        return len(self.captions(index))

    def relevance(self, positions: Sequence[int]) -> Tensor | None:
        """How much the images at `positions` (n) show of one another, `[n, n]` in [0, 1]; None where nobody knows."""
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
    """Captions of one record, without its image where the source allows that."""
    return records.captions(index) if isinstance(records, LazyRecords) else records[index].captions


def caption_count(records: Sequence[Record], index: int) -> int:
    return records.caption_count(index) if isinstance(records, LazyRecords) else len(records[index].captions)


def identity_of(records: Sequence[Record], index: int) -> int:
    return records.identity(index) if isinstance(records, LazyRecords) else records[index].identity


def name_of(records: Sequence[Record], index: int) -> str:
    return records.name(index) if isinstance(records, LazyRecords) else records[index].name


def relevance_of(records: Sequence[Record], positions: Sequence[int]) -> Tensor | None:
    """Graded relevance `[n, n]` among the images at `positions` (n), where the records have such ground truth."""
    return records.relevance(positions) if isinstance(records, LazyRecords) else None


@dataclass
class LoadReport:
    """What was read and what was skipped: counts by reason, and the first few names of each.

    Example:
        >>> from loopitr import LoadReport
        >>> report = LoadReport(images=2, captions=3)
        >>> report.skip("empty caption", "3.jpg")
        >>> report.counts
        {'empty caption': 1}
    """

    images: int = 0
    captions: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    max_names: int = 5

    @property
    def skipped(self) -> int:
        return sum(self.counts.values())

    def add(self, captions: int) -> None:
        """Count one image that was kept, with its number of captions."""
        self.images += 1
        self.captions += captions

    def skip(self, reason: str, name: str) -> None:
        """Count one thing that was skipped, and keep its name if it is among the first few of that reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        name = printable(name)
        if len(names) < self.max_names and name not in names:
            names.append(name)

    def merge_skips(self, other: LoadReport, name: str | None = None) -> None:
        """Count the skips of `other` here, all under one name or under their own."""
        for reason, count in other.counts.items():
            names = other.names[reason] if name is None else [name]
            for number in range(count):
                self.skip(reason, names[min(number, len(names) - 1)])

    def summary(self) -> str:
        """One line about what was read, and how much was skipped for which reasons."""
        parts = []
        for reason, count in self.counts.items():
            names = self.names[reason]
            parts.append(f"{count} x {reason} ({', '.join(names)}{', ...' if count > len(names) else ''})")
        skipped = "nothing skipped" if not parts else "skipped " + "; ".join(parts)
        return f"{self.images} images, {self.captions} captions; {skipped}"

    def check(self, max_fraction: float, *, seen: int | None = None) -> None:
        """Check that at most `max_fraction` of `seen` items (default: captions read and skipped) was skipped.

        Raises:
            DataError: more was.
        """
        total = max(self.captions + self.skipped if seen is None else seen, 1)
        if not self.skipped <= max_fraction * total:  # The fraction may be NaN.
            raise DataError(
                f"{self.skipped} of {total} items were skipped, more than the allowed fraction "
                f"{max_fraction}: {self.summary()}"
            )


def clean_captions(value: Any, name: str, report: LoadReport) -> tuple[str, ...]:
    """Captions with single spaces from one string or a list of strings; those without a visible character are skipped
    and counted.

    Raises:
        DataError: something other than text.
    """
    shown = printable(name)
    values = [] if value is None else [value] if isinstance(value, str) else value
    # A string is a sequence of strings too, so that it is wrapped above and never iterated.
    if not isinstance(values, (list, tuple)):
        raise DataError(f"{shown}: a caption must be text or a list of texts, got {type(value).__name__}")
    captions = []
    for item in values:
        if not isinstance(item, (str, type(None))):
            raise DataError(f"{shown}: a caption must be text, got {type(item).__name__}")
        text = " ".join((item or "").split())
        if all(unicodedata.category(character) in INVISIBLE for character in text):
            report.skip("empty caption", name)
        elif not _is_unicode(text):
            report.skip("caption with half a character (a lone surrogate)", name)
        else:
            captions.append(text)
    return tuple(captions)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def stable_hash(value: str | bytes) -> int:
    """Signed 64-bit hash that is the same in every process (Python's own is salted)."""
    # Names of files that are not UTF-8 hold surrogates.
    data = value.encode(errors="surrogatepass") if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)

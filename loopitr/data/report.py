"""What a source reads and what it skips: the report, and the cleaning of captions."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from typing import Any

from .records import DataError, printable

# Unicode's control and format characters, its spaces, and the marks that change the letter before them.
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"}
BOM = "\ufeff"  # Editors put it at the beginning of a text file, such as that of a caption in a tar.
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # a blank Braille cell and blank Korean letters


@dataclass
class LoadReport:
    """What was read and what was skipped: counts by reason, with the first few names.

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
        """The number of things skipped, for all reasons."""
        return sum(self.counts.values())

    def add(self, captions: int) -> None:
        """Count one image with its number of captions."""
        self.images += 1
        self.captions += captions

    def skip(self, reason: str, name: str) -> None:
        """Count one thing that was skipped, and keep its name if it is among the first few for that reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        name = printable(name)
        if len(names) < self.max_names and name not in names:
            names.append(name)

    def merge_skips(self, other: LoadReport, name: str | None = None) -> None:
        """Add the skips of `other`, all under one name, or under their own if `name` is None."""
        for reason, count in other.counts.items():
            names = other.names[reason] if name is None else [name]
            for number in range(count):
                self.skip(reason, names[min(number, len(names) - 1)])

    def summary(self) -> str:
        """One line on what was read, what was skipped, and why."""
        parts = []
        for reason, count in self.counts.items():
            names = self.names[reason]
            parts.append(f"{count} x {reason} ({', '.join(names)}{', ...' if count > len(names) else ''})")
        skipped = "nothing skipped" if not parts else "skipped " + "; ".join(parts)
        return f"{self.images} images, {self.captions} captions; {skipped}"

    def check(self, max_fraction: float, *, seen: int | None = None) -> None:
        """Check that at most `max_fraction` of `seen` items was skipped (None: of all captions, skipped ones included).

        Raises:
            DataError: more were skipped.
        """
        total = max(self.captions + self.skipped if seen is None else seen, 1)
        if not self.skipped <= max_fraction * total:  # The fraction may be NaN.
            raise DataError(
                f"{self.skipped} of {total} items were skipped, more than the allowed fraction "
                f"{max_fraction}: {self.summary()}"
            )


def clean_captions(value: Any, name: str, report: LoadReport) -> tuple[str, ...]:
    """Captions with single spaces, from one string or a list of strings.

    Captions without a visible character are skipped and counted in `report`, under `name`.

    Raises:
        DataError: `value` contains something other than text.
    """
    shown = printable(name)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)):  # A string, a sequence too, was wrapped above.
        raise DataError(f"{shown}: a caption must be text or a list of texts, got {type(value).__name__}")
    captions = []
    for item in values:
        if not isinstance(item, (str, type(None))):
            raise DataError(f"{shown}: a caption must be text, got {type(item).__name__}")
        text = " ".join((item or "").removeprefix(BOM).split())
        if all(letter in BLANK or unicodedata.category(letter) in INVISIBLE for letter in text):
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

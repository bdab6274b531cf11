"""The file of a model card, with a mark that tells a generated card from one that a user wrote or changed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from loopitr.durable import write_file

CARD = "README.md"
MARK = "<!-- written by loopitr ({}); a card that is changed by hand is kept -->"
MARKED = re.compile(r"\n<!-- written by loopitr \(([0-9a-f]{16})\)[^\n]*-->\n?\Z")


def save_card(path: Path, card: str) -> None:
    """Write a generated card atomically, with the mark by which `is_own` recognises it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, _marked(card))


def may_write(path: Path) -> bool:
    """Whether there is no card at `path`, or one that `save_card` wrote and nobody has changed."""
    try:
        return is_own(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return not path.is_symlink()
    except (OSError, UnicodeDecodeError):
        return False


def is_own(card: str) -> bool:
    """Whether `save_card` wrote this text and nobody has changed it."""
    text = card.replace("\r\n", "\n")
    mark = MARKED.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _marked(card: str) -> str:
    text = card.rstrip("\n") + "\n"
    return f"{text}\n{MARK.format(_digest(text))}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]

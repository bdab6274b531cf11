"""HTML of hits, with images as data URIs and all text escaped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

from loopitr.data import UnreadableImage
from loopitr.evaluation.thumbnails import thumbnail

from .cached_searcher import COLUMN, Placed
from .searcher import Hit, Searcher

SIDE = 256  # pixels of a picture
KEPT = 2_000  # the number of pictures kept in memory, about 10 kB each
CHARACTERS = 200  # the most characters of a caption that are shown
TEMPLATE_SIGNS = {ord(sign): f"&#{ord(sign)};" for sign in "{}$`\\"}
STYLE = """
.loopitr { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
.loopitr figure { margin: 0; }
.loopitr img { aspect-ratio: 4 / 3; width: 100%; object-fit: contain; background: #8882; border-radius: .4rem; }
.loopitr figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.loopitr .up { color: #1a7f37; font-weight: bold; }
.loopitr .down { color: #c62828; font-weight: bold; }
.loopitr small { opacity: .8; display: block; }
.loopitr-own { max-height: 160px; max-width: 100%; border-radius: .4rem; }
.loopitr-upload a { pointer-events: none; }
"""


class Thumbnails:
    """Makes small pictures of hits as data URIs, and keeps the latest; only images of the index are opened."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher
        self._kept: dict[str, str] = {}

    def __call__(self, hit: Hit) -> str:
        """The data URI of a hit's picture.

        Raises:
            UnreadableImage: its file no longer exists, or cannot be opened.
        """
        key = f"{hit.path} {hit.columns.get('size')} {hit.columns.get('mtime')}"
        if key not in self._kept:
            small = thumbnail(self.searcher.picture(hit, shortest=SIDE), hit.path, side=SIDE)
            if len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = small
        return self._kept[key]


def grid(placed: Sequence[Placed], picture: Callable[[Hit], str], *, moves: bool) -> str:
    """A grid of pictures with place, scores, caption and name; `moves`: also the number of places that each moved."""
    if not placed:
        return "<p>No image found.</p>"
    return '<div class="loopitr">' + "".join(_figure(each, picture, moves=moves) for each in placed) + "</div>"


def preview(image: Image.Image) -> str:
    """The image that was asked with, small, within the page."""
    return f'<img class="loopitr-own" src="{thumbnail(image, side=SIDE)}" alt="the image that was dropped">'


def caption_list(captions: Sequence[tuple[str, float]]) -> str:
    """A list of captions with their scores, best first."""
    if not captions:
        return "<p>The index has no column 'caption'.</p>"
    items = "".join(f"<li>{text_of(text)} <small>({score:.2f})</small></li>" for text, score in captions)
    return f"<ol>{items}</ol>"


def text_of(text: str, characters: int = CHARACTERS) -> str:
    """Text escaped for HTML and for the page's templates, and shortened."""
    whole = text if len(text) <= characters else text[: characters - 1] + "\u2026"
    return escape(whole.encode(errors="backslashreplace").decode()).translate(TEMPLATE_SIGNS)


def _figure(placed: Placed, picture: Callable[[Hit], str], *, moves: bool) -> str:
    hit = placed.hit
    name, path = text_of(os.path.basename(hit.path) or hit.path), text_of(hit.path, 1_000)
    caption = text_of(str(hit.columns.get(COLUMN) or "").partition("\n")[0])
    try:
        image = f'<img src="{picture(hit)}" alt="{caption or name}">'
    except UnreadableImage as error:
        image = f"<p>{text_of(error.reason)}</p>"
    scores = f"similarity {hit.similarity:.3f}"
    if hit.match is not None:
        scores += f", match {hit.match:+.2f}"
    move = _move(placed) if moves else ""
    below = f'{placed.place}. {move} <span dir="auto">{caption or name}</span><small>{scores}</small>'
    return f'<figure title="{path}">{image}<figcaption>{below}</figcaption></figure>'


def _move(placed: Placed) -> str:
    places = placed.dual_place - placed.place
    if not places:
        return "="
    kind, sign = ("up", "&uarr;") if places > 0 else ("down", "&darr;")
    return f'<span class="{kind}" title="place {placed.dual_place} by the dual head">{sign}{abs(places)}</span>'

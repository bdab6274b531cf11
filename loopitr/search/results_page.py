"""A page of search results: one HTML file that contains the pictures."""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loopitr.data import UnreadableImage
from loopitr.evaluation.thumbnails import thumbnail

from .searcher import Hit, Searcher

SIDE = 320  # pixels of a picture on the page

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }}
main {{ display: grid; gap: 1.2em; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)) }}
figure {{ margin: 0 }}
img {{ aspect-ratio: 4 / 3; background: #eee; border-radius: 6px; object-fit: contain; width: 100% }}
figcaption {{ overflow-wrap: anywhere }}
small {{ color: #555 }}
</style>
</head>
<body>
<h1>{title}</h1>
<main>
{figures}
</main>
</body>
</html>
"""


def write_page(searcher: Searcher, query: str, hits: Sequence[Hit], output: str | Path | None = None) -> Path:
    """Write a page of these hits; returns its path.

    Args:
        output: the path of the file; None: a new file in the system's temporary folder.

    Raises:
        OSError: the file cannot be written.
    """
    figures = "\n".join(_figure(searcher, rank, hit) for rank, hit in enumerate(hits, start=1))
    page = PAGE.format(title=html.escape(query), figures=figures or "<p>no image found</p>")
    if output is None:
        words = re.sub(r"\W+", "-", query)[:40].strip("-")
        with tempfile.NamedTemporaryFile(prefix=f"loopitr-{words}-", suffix=".html", delete=False) as file:
            output = file.name
    Path(output).write_text(page, encoding="utf-8")
    return Path(output)


def _figure(searcher: Searcher, rank: int, hit: Hit) -> str:
    scores = f"similarity {hit.similarity:.3f}"
    if hit.match is not None:
        scores += f", match {hit.match:.2f}, score {hit.score:.2f}"
    path, caption = html.escape(hit.path), html.escape(str(hit.columns.get("caption", "")))
    try:
        picture = f'<img src="{thumbnail(searcher.picture(hit, shortest=SIDE), side=SIDE)}" alt="{caption or path}">'
    except UnreadableImage as error:
        picture = f"<p>{html.escape(error.reason)}</p>"
    below = f"{rank}. {path}<br><small>{scores}</small>" + (f"<br>{caption}" if caption else "")
    return f"<figure>{picture}<figcaption>{below}</figcaption></figure>"

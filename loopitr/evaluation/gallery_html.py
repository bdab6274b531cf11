"""A self-contained HTML page of example queries, with the dual head's answers next to the reranked ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from html import escape

from loopitr.data import Record, UnreadableImage, name_of

from .examples import Answer, Example, Examples
from .report import RetrievalResult, weight_text
from .thumbnails import thumbnail

CHARACTERS = 300  # the most characters of a caption or a name that are shown
DIRECTIONS = {"t2i": "Text to image", "i2t": "Image to text"}
KINDS = {
    "gained": "gained: right only after reranking",
    "lost": "lost: right only before reranking",
    "wrong": "wrong",
    "right": "right",
}
STYLE = """
:root { color-scheme: light dark; --right: #1a7f37; --wrong: #c62828; --line: #8886; }
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1500px; margin: 1.5rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; }
section { border-top: 1px solid var(--line); padding: .8rem 0; }
.kind { display: inline-block; padding: 0 .5rem; border-radius: .6rem; background: #8883; font-weight: normal; }
.gained { background: var(--right); color: white; }
.lost { background: var(--wrong); color: white; }
.heads { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: .5rem 2rem; }
ol { list-style: none; margin: 0; padding: 0; display: flex; gap: .5rem; }
ol.texts { flex-direction: column; gap: .2rem; }
li { flex: 1 1 0; min-width: 0; font-size: .8rem; overflow-wrap: anywhere; border-top: 4px solid; padding-top: .2rem; }
ol.texts li { border-top: 0; border-left: 4px solid; padding: 0 0 0 .5rem; font-size: .9rem; }
li.right { border-color: var(--right); }
li.wrong { border-color: var(--wrong); }
.right b { color: var(--right); }
.wrong b { color: var(--wrong); }
img { max-width: 100%; height: 7rem; object-fit: contain; display: block; }
p { margin: .3rem 0; }
small { opacity: .75; }
"""


def gallery_page(result: RetrievalResult, records: Sequence[Record], *, title: str) -> str:
    """An HTML page of `result.examples`, a few dozen kilobytes per query.

    Texts are escaped. Images are small JPEGs in the page; if one cannot be opened, its name is shown.

    Args:
        result: of an evaluation with `EvaluationOptions.examples` above 0.
        records: the evaluated records.

    Raises:
        ValueError: the result has no examples.

    Example (`model` and `processor` as in the example of `build_model`):
        >>> from loopitr import EvaluationOptions, evaluate_retrieval, load_records
        >>> from loopitr.data import DataOptions, LoadReport
        >>> from loopitr.evaluation import gallery_page
        >>> records = load_records(DataOptions(scenes=True, limit=4), "test", LoadReport())
        >>> result = evaluate_retrieval(model, processor, records, EvaluationOptions(rerank=4, examples=2))
        >>> gallery_page(result, records, title="scenes").count("<section")
        4
    """
    if not result.examples:
        raise ValueError("the result has no examples: EvaluationOptions.examples was 0")
    picture = cache(lambda position: _picture(records, position))
    name = "reranked"
    if result.similarity_weight is not None:
        name += f" ({weight_text(result.similarity_weight)})"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{result.num_images} images, {result.num_captions} captions. ",
        f"{_legend(result.k)}</p>",
        _counts(result),
    ]
    for direction, heading in DIRECTIONS.items():
        examples = result.examples[direction]
        total = sum(examples.counts.values())
        parts.append(f"<h2>{heading}: {len(examples.shown)} of {total} queries</h2>")
        parts += [_example(example, picture, name) for example in examples.shown]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n"
        "</body>\n</html>\n"
    )


def _legend(k: int) -> str:
    if not k:
        return "Answers of the dual encoder, with their similarity."
    return (
        f"First the dual encoder's answers with their similarity; next to them its best {k} reranked, with their match "
        "score and the number of places that they moved."
    )


def _counts(result: RetrievalResult) -> str:
    """A table of the number of queries of each kind."""
    counts = {DIRECTIONS[direction]: result.examples[direction] for direction in DIRECTIONS}
    header = ["", "queries", "dual right", *(["reranked right", "gained", "lost"] if result.k else [])]
    rows = [_count_row(name, examples) for name, examples in counts.items()]
    cells = ["".join(f"<th>{cell}</th>" for cell in header)]
    cells += [f"<th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "\n</table>"


def _count_row(name: str, examples: Examples) -> list[str]:
    counts, total = examples.counts, sum(examples.counts.values())
    dual = counts["right"] + counts.get("lost", 0)
    row = [name, str(total), _percent(dual, total)]
    if "gained" in counts:
        row += [_percent(counts["right"] + counts["gained"], total), str(counts["gained"]), str(counts["lost"])]
    return row


def _percent(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f}%)"


def _example(example: Example, picture: Callable[[int], str], reranked: str) -> str:
    query = example.query
    shown = picture(query) if isinstance(query, int) else f'<span dir="auto">{_text(query)}</span>'
    kind = f'<span class="kind {example.kind}">{KINDS[example.kind]}</span>'
    ranks = " &rarr; ".join(f"{rank:.0f}" if math.isfinite(rank) else "not a candidate" for rank in example.ranks)
    heads = [("dual", example.dual)] + ([(reranked, example.reranked)] if example.reranked else [])
    columns = [
        f"<div><p>{name}</p>{_answers(answers, picture, head)}</div>" for head, (name, answers) in enumerate(heads)
    ]
    return (
        f"<section>\n<h3>{shown}</h3>\n<p>{kind} <small>best right answer: place {ranks}</small></p>\n"
        f'<div class="heads">\n' + "\n".join(columns) + "\n</div>\n</section>"
    )


def _answers(answers: Sequence[Answer], picture: Callable[[int], str], head: int) -> str:
    items = []
    for place, answer in enumerate(answers, 1):
        content = (
            picture(answer.item) if isinstance(answer.item, int) else f'<span dir="auto">{_text(answer.item)}</span>'
        )
        mark = "&#10003; right" if answer.right else "&#10007; wrong"
        score = f"{answer.score:+.1f} {_move(answer.place - place)}" if head else f"{answer.score:.3f}"
        items.append(
            f'<li class="{"right" if answer.right else "wrong"}">{content} <b>{mark}</b> <small>{score}</small></li>'
        )
    kind = "images" if answers and isinstance(answers[0].item, int) else "texts"
    return f'<ol class="{kind}">' + "".join(items) + "</ol>"


def _move(places: int) -> str:
    return f"&uarr;{places}" if places > 0 else f"&darr;{-places}" if places < 0 else "="


def _picture(records: Sequence[Record], position: int) -> str:
    name = _text(name_of(records, position))
    try:
        return f'<img src="{thumbnail(records[position].image)}" alt="{name}" title="{name}" loading="lazy">'
    except UnreadableImage:
        return f"<i>{name} cannot be opened</i>"


def _text(text: str) -> str:
    """Text escaped and shortened; lone surrogates, as in file names that are not UTF-8, become escape sequences."""
    whole = text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "\u2026"
    return escape(whole.encode(errors="backslashreplace").decode())

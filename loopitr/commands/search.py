"""What `loopitr search` does: an index of images is made, searched and changed."""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from loopitr.cli import parse

from .serve import SERVE, ServeOptions, serve
from .subcommands import Command, dispatch, positional

# What the options do without is imported where it is used, so that --help does not wait for torch.
if TYPE_CHECKING:
    from loopitr.search.indexing import IndexReport
    from loopitr.search.searcher import Hit

ABOUT = """\
Search images by text or by image: the dual head finds candidates, the fusion head orders them. An index is a folder.

  loopitr search index photos/ --model RUN --output INDEX/
  loopitr search query INDEX/ "a dog on the beach"
  loopitr search serve INDEX/
"""
FOOT = "`loopitr search COMMAND --help` shows the options of a command.\n"
INDEX = """\
loopitr search index SOURCE --model RUN --output INDEX

Indexes the images of SOURCE: a folder, which is walked through, a CSV, TSV or JSON-lines file, or with --split a
`datasets` source. Called again, it goes on where it was interrupted, and takes in what is new or changed.
"""
QUERY = """\
loopitr search query INDEX QUERY

Prints the best images for a text, or for an image that is given by its path. Of a text the best candidates of the dual
head are scored by the fusion head: similarity, match score, reranking score and path, best first.
"""
ADD = """\
loopitr search add INDEX SOURCE

Indexes the images of another source into an index, with its model.
"""
REMOVE = """\
loopitr search remove INDEX [PATH ...]

Removes images from an index, by their paths or those of folders, by a condition, or where their files are gone. The
files stay.
"""
INFO = """\
loopitr search info INDEX

What an index holds.
"""
SHOWN = 10  # skipped images that are named; the index lists all


@dataclass
class Reading:
    """How images are found and opened."""

    images: str | None = None
    """Folder that relative paths of a table start from; unset: the folder of the table."""
    image_column: str | None = None
    """Column with the image (a table: "image"; a `datasets` source: guessed if it has a usual name)."""
    split: str | None = None
    """SOURCE is a `datasets` source, whose split this is: a hub id, a folder, or a format (parquet) with data_files."""
    data_files: str | None = None
    """Files of a `datasets` source, as a pattern."""
    batch_size: int = 32
    """Images encoded at a time."""
    num_workers: int | None = None
    """Processes that open images; unset: one for each core."""
    device: str | None = None
    """cpu, cuda, ...; unset: a GPU if there is one."""


@dataclass
class IndexOptions(Reading):
    """What is indexed, by which model."""

    source: str = ""
    """Folder, table or `datasets` source."""
    model: str = ""
    """Run folder, exported dual encoder, or hub id."""
    output: str = ""
    """Folder of the index."""
    tokens: Literal["fp16", "bf16", "none"] = "fp16"
    """What image tokens are kept in, for reranking without opening an image; none: images are opened again for it."""
    store: str | None = None
    """Address of a Qdrant server for the vectors (http://host:6333); unset: LanceDB in the index."""
    contents: str | None = None
    """Where image tokens are kept, such as s3://bucket/folder; unset: in the index."""


@dataclass
class AddOptions(Reading):
    """What is added to which index."""

    index: str = ""
    """Folder of the index."""
    source: str = ""
    """Folder, table or `datasets` source."""
    model: str | None = None
    """The index's model, where it has moved."""


@dataclass
class QueryOptions:
    """What is asked of which index."""

    index: str = ""
    """Folder of the index."""
    query: str = ""
    """A text, or the path of an image."""
    top: int = 10
    """Images that are printed."""
    rerank: int = 100
    """Candidates of a text that the fusion head scores; 0: similarity alone."""
    where: str | None = None
    """Condition on the columns, as in SQL: "width > 800 AND caption LIKE '%dog%'"."""
    similarity_weight: float | None = None
    """Weight of the similarity in the reranking score; unset: the model's own."""
    json: bool = False
    """Print JSON."""
    open: bool = False
    """Write an HTML page of the results, and open it in a browser."""
    html: str | None = None
    """Where that page is written; unset: in the system's temporary folder, if --open."""
    model: str | None = None
    """The index's model, where it has moved."""
    device: str | None = None
    """cpu, cuda, ...; unset: a GPU if there is one."""


@dataclass
class RemoveOptions:
    """What is removed from which index; one of the three."""

    index: str = ""
    """Folder of the index."""
    paths: list[str] | None = None
    """Images, or folders with all that is in them."""
    where: str | None = None
    """Condition on the columns, as in SQL."""
    missing: bool = False
    """Images whose files are gone."""


@dataclass
class InfoOptions:
    """Which index."""

    index: str = ""
    """Folder of the index."""
    json: bool = False
    """Print JSON."""


def main(arguments: Sequence[str]) -> None:
    """
    Raises:
        ValueError, OSError, ModuleNotFoundError: what the user can mend.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # A path may hold what a terminal cannot show.
    dispatch("loopitr search", ABOUT, FOOT, COMMANDS, arguments)


def _options(options: type[Any], arguments: Sequence[str], description: str, *required: str) -> Any:
    """Parsed options, of which `required` are not empty."""
    name = description.split()[2]
    given = parse(options, arguments, description=description, program=f"loopitr search {name}")
    for field in required:
        if not getattr(given, field).strip():
            raise ValueError(f"no {field} is given: {description.splitlines()[0]}")
    return given


def _quiet() -> None:
    """Neither bars of loading weights, nor warnings with a line of Python."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)


def _index(arguments: Sequence[str]) -> None:
    words = positional(arguments, "source")
    options = _options(IndexOptions, words, INDEX, "source", "model", "output")
    from loopitr.search.indexing import build_index

    _quiet()
    report = build_index(
        _source(options),
        options.model,
        options.output,
        tokens=options.tokens,
        store=options.store,
        contents=options.contents,
        device=options.device,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    _say(report, options.output)


def _add(arguments: Sequence[str]) -> None:
    options = _options(AddOptions, positional(arguments, "index", "source"), ADD, "index", "source")
    from loopitr.search.indexing import add_images

    _quiet()
    report = add_images(
        _source(options),
        options.index,
        model=options.model,
        device=options.device,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    _say(report, options.index)


def _source(options: Any) -> Any:
    from loopitr.search.sources import open_source

    if options.split is None:
        return open_source(options.source, options.images, options.image_column or "image")
    from loopitr.search.hub_source import hub_source

    return hub_source(options.source, options.split, options.image_column, options.data_files)


def _say(report: "IndexReport", index: str) -> None:
    for path, reason in [*report.skipped.items()][:SHOWN]:
        print(f"skipped {path}: {reason}")
    if len(report.skipped) > SHOWN:
        print(f"and {len(report.skipped) - SHOWN} more, see {index}/skipped.csv")
    print(f"{index}: {report.summary()}")


def _query(arguments: Sequence[str]) -> None:
    options = _options(QueryOptions, positional(arguments, "index", "query"), QUERY, "index")
    from loopitr.search.searcher import Searcher

    _quiet()
    searcher = Searcher.open(options.index, device=options.device, model=options.model)
    hits = searcher.search(
        options.query,
        top=options.top,
        rerank=options.rerank,
        where=options.where,
        similarity_weight=options.similarity_weight,
    )
    print(json.dumps([asdict(hit) for hit in hits], indent=2, default=str) if options.json else _table(hits))
    if options.open or options.html:
        from loopitr.search.results_page import write_page

        page = write_page(searcher, options.query, hits, options.html)
        print(f"written to {page}", file=sys.stderr)
        if options.open:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())


def _table(hits: "Sequence[Hit]") -> str:
    if not hits:
        return "no image fits"
    lines = ["similarity    match    score  path"]
    for hit in hits:
        match = "-" if hit.match is None else f"{hit.match:.3f}"
        lines.append(f"{hit.similarity:10.4f} {match:>8} {hit.score:8.3f}  {hit.path}")
    return "\n".join(lines)


def _remove(arguments: Sequence[str]) -> None:
    options = _options(RemoveOptions, positional(arguments, "index", rest="paths"), REMOVE, "index")
    from loopitr.search.removing import remove_images

    removed = remove_images(options.index, options.paths or (), where=options.where, missing=options.missing)
    print(f"{removed} images removed from {options.index}")


def _serve(arguments: Sequence[str]) -> None:
    options = _options(ServeOptions, positional(arguments, "index"), SERVE, "index")
    _quiet()
    serve(options)


def _info(arguments: Sequence[str]) -> None:
    options = _options(InfoOptions, positional(arguments, "index"), INFO, "index")
    from loopitr.search.manifest import read_manifest
    from loopitr.search.searcher import index_info
    from loopitr.search.stores import open_images

    manifest = read_manifest(options.index)
    info = index_info(options.index, manifest, open_images(options.index, manifest))
    if options.json:
        print(json.dumps(info, indent=2))
        return
    for name, value in info.items():
        print(f"{name:14}{', '.join(value) if isinstance(value, list) else '-' if value is None else value}")


COMMANDS = {
    "index": Command("index the images of a folder, a table or a `datasets` source; goes on where it stopped", _index),
    "query": Command("the best images of an index for a text or an image", _query),
    "serve": Command("a page in the browser on which an index is searched", _serve),
    "add": Command("index another source into an index", _add),
    "remove": Command("remove images from an index", _remove),
    "info": Command("what an index holds", _info),
}

"""`loopitr search`: builds, searches and changes an index of images."""

import json
import math
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loopitr.cli import check_output_file, parse

from .search_options import AddOptions, IndexOptions, InfoOptions, QueryOptions, RemoveOptions
from .serve import SERVE, ServeOptions, serve
from .subcommands import Command, dispatch, positional, quiet

# Heavy modules are imported where they are used, so that --help works without torch.
if TYPE_CHECKING:
    from loopitr.search.searcher import Hit
    from loopitr.search.writer import IndexReport

ABOUT = """\
Search images by text or by image: the dual head finds candidates, the fusion head reranks them. An index is a folder.

  loopitr search index photos/ --model RUN --output INDEX/
  loopitr search query INDEX/ "a dog on the beach"
  loopitr search serve INDEX/
"""
FOOT = "`loopitr search COMMAND --help` shows the options of a command.\n"
INDEX = """\
loopitr search index SOURCE --model RUN --output INDEX [--OPTION VALUE ...]

Indexes the images of SOURCE: a folder with its subfolders, a CSV, TSV or JSON-lines file, or with --split a `datasets`
source. Called again, it continues after an interruption, and indexes new and changed images.
"""
QUERY = """\
loopitr search query INDEX QUERY [--top 10] [--rerank 100] [--where CONDITION] [--OPTION VALUE ...]

Prints the best images for a text, or for an image given by its path, with similarity, match score, reranking score and
path. For a text, the fusion head reranks the best candidates of the dual head.
"""
ADD = """\
loopitr search add INDEX SOURCE [--OPTION VALUE ...]

Adds the images of another source to an index, with the model of the index.
"""
REMOVE = """\
loopitr search remove INDEX PATH ... | --where CONDITION | --missing

Removes images from an index, but not their files: by the paths of images or folders, by a condition, or those whose
files no longer exist.
"""
INFO = """\
loopitr search info INDEX [--json]

Prints what an index contains.
"""
SHOWN = 10  # the number of skipped images that are printed; skipped.csv has all


def main(arguments: Sequence[str]) -> None:
    """Run one of the commands of `loopitr search`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: an error that the user can correct.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # A path may have characters that the terminal cannot show.
    dispatch("loopitr search", ABOUT, FOOT, COMMANDS, arguments)


def _options(options: type[Any], arguments: Sequence[str], description: str, *required: str) -> Any:
    """Parse options, and check that `required` ones are given."""
    name = description.split()[2]
    given = parse(options, arguments, description=description, program=f"loopitr search {name}")
    for field in required:
        if not getattr(given, field).strip():
            raise ValueError(f"no {field} is given: {description.splitlines()[0]}")
    return given


def _index(arguments: Sequence[str]) -> None:
    words = positional(arguments, "source")
    options = _options(IndexOptions, words, INDEX, "source", "model", "output")
    from loopitr.search.indexing import build_index

    quiet()
    report = build_index(
        _source(options),
        options.model,
        options.output,
        tokens=options.tokens,
        store=options.store,
        collection=options.collection,
        contents=options.contents,
        device=options.device,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    _print_report(report, options.output)


def _add(arguments: Sequence[str]) -> None:
    options = _options(AddOptions, positional(arguments, "index", "source"), ADD, "index", "source")
    from loopitr.search.indexing import add_images

    quiet()
    report = add_images(
        _source(options),
        options.index,
        model=options.model,
        device=options.device,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    _print_report(report, options.index)


def _source(options: Any) -> Any:
    from loopitr.search.sources import open_source

    if options.split is None:
        return open_source(options.source, options.images, options.image_column or "image")
    from loopitr.search.hub_source import hub_source

    return hub_source(options.source, options.split, options.image_column, options.data_files)


def _print_report(report: "IndexReport", index: str) -> None:
    for path, reason in [*report.skipped.items()][:SHOWN]:
        print(f"skipped {_one_line(path)}: {reason}")
    if len(report.skipped) > SHOWN:
        print(f"and {len(report.skipped) - SHOWN} more, see {index}/skipped.csv")
    print(f"{index}: {report.summary()}")


def _query(arguments: Sequence[str]) -> None:
    options = _options(QueryOptions, positional(arguments, "index", "query"), QUERY, "index")
    if not options.query.strip():  # before a model is loaded
        raise ValueError("the query is empty: give a text, or the path of an image")
    if options.html is not None:
        check_output_file(options.html)
    from loopitr.search.inputs import is_text
    from loopitr.search.searcher import Searcher

    quiet()
    searcher = Searcher.open(options.index, device=options.device, model=options.model)
    hits = searcher.search(
        options.query,
        top=options.top,
        rerank=options.rerank,
        where=options.where,
        similarity_weight=options.similarity_weight,
    )
    if options.rerank > 0 and not searcher.reranks and is_text(options.query):
        print(f"warning: {searcher.retriever.source} has no fusion head to rerank with", file=sys.stderr)
    print(json.dumps([_plain(asdict(hit)) for hit in hits], indent=2, default=str) if options.json else _table(hits))
    if options.open or options.html:
        from loopitr.search.results_page import write_page

        page = write_page(searcher, options.query, hits, options.html)
        print(f"written to {page}", file=sys.stderr)
        if options.open:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())


def _plain(value: Any) -> Any:
    """`value` with None for NaN and infinite numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(hits: "Sequence[Hit]") -> str:
    if not hits:
        return "no image found"
    lines = ["similarity    match    score  path"]
    for hit in hits:
        match = "-" if hit.match is None else f"{hit.match:.3f}"
        lines.append(f"{hit.similarity:10.4f} {match:>8} {hit.score:8.3f}  {_one_line(hit.path)}")
    return "\n".join(lines)


def _one_line(path: str) -> str:
    """A path in which control characters, which could break the line or steer the terminal, are escaped."""
    return "".join(repr(sign)[1:-1] if unicodedata.category(sign) == "Cc" else sign for sign in path)


def _remove(arguments: Sequence[str]) -> None:
    options = _options(RemoveOptions, positional(arguments, "index", rest="paths"), REMOVE, "index")
    from loopitr.search.removing import remove_images

    removed = remove_images(options.index, options.paths or (), where=options.where, missing=options.missing)
    print(f"{removed} images removed from {options.index}")


def _serve(arguments: Sequence[str]) -> None:
    options = _options(ServeOptions, positional(arguments, "index"), SERVE, "index")
    quiet()
    serve(options)


def _info(arguments: Sequence[str]) -> None:
    options = _options(InfoOptions, positional(arguments, "index"), INFO, "index")
    from loopitr.reading import user_path
    from loopitr.search.manifest import read_manifest
    from loopitr.search.searcher import index_info
    from loopitr.search.stores import open_images

    folder = user_path(options.index)
    manifest = read_manifest(folder)
    info = index_info(folder, manifest, open_images(folder, manifest))
    if options.json:
        print(json.dumps(info, indent=2))
        return
    for name, value in info.items():
        print(f"{name:14}{', '.join(value) if isinstance(value, list) else '-' if value is None else value}")


COMMANDS = {
    "index": Command("index the images of a folder, a table or a `datasets` source, or update an index", _index),
    "query": Command("print the best images of an index for a text or an image", _query),
    "serve": Command("serve a search page for the browser", _serve),
    "add": Command("add the images of another source to an index", _add),
    "remove": Command("remove images from an index", _remove),
    "info": Command("print what an index contains", _info),
}

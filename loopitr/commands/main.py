"""The console script `loopitr`: one subcommand for each thing that is done with a trained model.

A subcommand is imported when it is chosen: jsonargparse's own subcommands would import the options of all of them, and
of `convert` torch, before the first line of `--help`.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from functools import partial

from loopitr.cli import parse, run

from .subcommands import Command, dispatch

ABOUT = "Image-text retrieval: what is done with a trained model of a dual and a cross encoder.\n"
FOOT = """\
options:
  --help, --version

`loopitr COMMAND --help` shows the options of a command. Training is `accelerate launch recipes/pretrain.py`.
"""

EVALUATE = """\
loopitr evaluate RUN [--data.table FILE --data.images FOLDER] [--rerank 64] [--OPTION VALUE ...]

Recall@1/5/10 in both directions, by the dual head alone and with its best candidates reranked. RUN is a run folder, an
exported dual encoder (with `--rerank 0`) or a hub id. Without a data source: the built-in scenes' test split.
Several processes give the same figures sooner: `accelerate launch recipes/evaluate.py` with the same options.
"""
CALIBRATE = """\
loopitr calibrate RUN [--data.table FILE --data.images FOLDER] [--rerank 64] [--OPTION VALUE ...]

Fits the weight w of the reranking score, match score + w x similarity / temperature, on held-out data, and keeps it in
RUN's config.json.
"""
EXPORT = """\
loopitr export RUN OUT [--to transformers|onnx|sentence-transformers] [--tower image|text] [--OPTION VALUE ...]

Writes a trained model in a form that others load: its dual encoder, or one tower of it, for `from_pretrained`; towers
and fusion head as ONNX graphs; a SentenceTransformer folder of stock modules.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the subcommand that the command line names; what its user can mend is one line and exit status 2."""
    run(partial(_dispatch, sys.argv[1:] if arguments is None else arguments))


def _dispatch(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] == "--version":
        print(f"loopitr {importlib.metadata.version('loopitr')}")
    else:
        dispatch("loopitr", ABOUT, FOOT, COMMANDS, arguments)


def _search(arguments: Sequence[str]) -> None:
    from loopitr.commands.search import main as search

    search(arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    from loopitr.commands.evaluate import EvaluateOptions, evaluate

    given = _named(arguments, ("model",))
    evaluate(parse(EvaluateOptions, given, description=EVALUATE, program="loopitr evaluate"))


def _calibrate(arguments: Sequence[str]) -> None:
    from loopitr.commands.calibrate import CalibrateOptions, calibrate

    given = _named(arguments, ("model",))
    calibrate(parse(CalibrateOptions, given, description=CALIBRATE, program="loopitr calibrate"))


def _export(arguments: Sequence[str]) -> None:
    from loopitr.commands.export import ExportOptions, export

    given = _named(arguments, ("model", "output"))
    export(parse(ExportOptions, given, description=EXPORT, program="loopitr export"))


def _named(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words before the first option become the values of these options, in this order."""
    count = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    given = [word for name, value in zip(names, arguments[:count]) for word in (f"--{name}", value)]
    return [*given, *arguments[min(count, len(names)) :]]


def _convert(arguments: Sequence[str]) -> None:
    from loopitr.convert.__main__ import main as convert

    convert(arguments, program="loopitr convert")


COMMANDS = {
    "search": Command("index images; find them by text or by image", _search),
    "evaluate": Command("recall of a saved model on any data, dual and reranked", _evaluate),
    "calibrate": Command("fit the weight of the similarity in a saved model's reranking score", _calibrate),
    "export": Command("write a saved model for transformers, ONNX or sentence-transformers", _export),
    "convert": Command("make a model folder of a public ALBEF or BLIP checkpoint", _convert),
}

if __name__ == "__main__":
    main()

"""The console script `loopitr`, with a subcommand for each use of a trained model.

A subcommand is imported only when it is chosen. jsonargparse's own subcommands would import all of them, and so torch,
for `--help`.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from functools import partial

from loopitr.cli import parse, run

from .subcommands import Command, dispatch

ABOUT = "Image-text retrieval with a trained model that is a dual and a cross encoder.\n"
FOOT = """\
options:
  --help, --version

`loopitr COMMAND --help` shows the options of a command. Training is `accelerate launch recipes/pretrain.py`.
"""

EVALUATE = """\
loopitr evaluate RUN [--data.table FILE --data.images FOLDER] [--rerank 64] [--OPTION VALUE ...]

Computes recall@1/5/10 in both directions, by the dual head alone and with its best candidates reranked. The model is a
run folder, an exported dual encoder (with `--rerank 0`) or a hub id. For a model trained on the built-in scenes, no
data source is needed. `accelerate launch recipes/evaluate.py` uses several processes for the same results.
"""
CALIBRATE = """\
loopitr calibrate RUN [--data.table FILE --data.images FOLDER] [--rerank 64] [--OPTION VALUE ...]

Fits the weight w of the reranking score, match score + w x similarity / temperature, on held-out data, and writes it to
the model's config.json.
"""
EXPORT = """\
loopitr export RUN OUT [--to transformers|onnx|sentence-transformers] [--tower image|text] [--OPTION VALUE ...]

Writes a trained model in a form that other libraries load: its dual encoder, or one tower, for `from_pretrained`; its
towers and fusion head as ONNX graphs; or a SentenceTransformer of stock modules.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the subcommand that the command line names; errors that the user can correct are one line, exit status 2."""
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
    """Turn the words before the first option into the options `names`, in this order."""
    count = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    given = [word for name, value in zip(names, arguments[:count]) for word in (f"--{name}", value)]
    return [*given, *arguments[min(count, len(names)) :]]


def _convert(arguments: Sequence[str]) -> None:
    from loopitr.convert.__main__ import main as convert

    convert(arguments, program="loopitr convert")


COMMANDS = {
    "search": Command("index images; find them by text or by image", _search),
    "evaluate": Command("recall of a saved model on any data, dual and reranked", _evaluate),
    "calibrate": Command("fit the similarity weight of a saved model's reranking score", _calibrate),
    "export": Command("write a saved model for transformers, ONNX or sentence-transformers", _export),
    "convert": Command("convert a public ALBEF or BLIP checkpoint to a model folder", _convert),
}

if __name__ == "__main__":
    main()

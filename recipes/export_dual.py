"""python recipes/export_dual.py --model RUN --output DIR

Writes the dual encoder of a trained model, without the fusion head: DIR loads with `DualEncoder.from_pretrained` and
`AutoProcessor.from_pretrained` and gives the same embeds, bit for bit. With `--to onnx` or `--to sentence-transformers`
it is in their form; `loopitr export RUN DIR` is the same.
"""

from loopitr.cli import parse, run
from loopitr.commands.export import ExportOptions, export


def main() -> None:
    export(parse(ExportOptions, description=__doc__))


if __name__ == "__main__":
    run(main)

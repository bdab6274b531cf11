"""python recipes/export_dual.py --model RUN --output DIR

Writes the dual encoder of a trained model, without the fusion head. `DualEncoder.from_pretrained` and
`AutoProcessor.from_pretrained` load DIR, which gives bit-identical embeds. `--to onnx` and `--to sentence-transformers`
write other forms. `loopitr export RUN DIR` does the same.
"""

from loopitr.cli import parse, run
from loopitr.commands.export import ExportOptions, export


def main() -> None:
    export(parse(ExportOptions, description=__doc__))


if __name__ == "__main__":
    run(main)

"""python recipes/export_dual.py --model RUN --output DIR

Writes the dual encoder of a trained model, without the fusion head: DIR loads with `DualEncoder.from_pretrained` and
`AutoProcessor.from_pretrained` and gives the same embeds, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from loopitr.cli import parse, run


@dataclass
class ExportOptions:
    """What goes where."""

    model: str
    """Run folder or hub id."""
    output: str
    """Folder to write."""


def main() -> None:
    options = parse(ExportOptions, description=__doc__)
    from loopitr.export.dual import export_dual  # after the options: --help does without torch

    dual = export_dual(options.model, options.output)
    parameters = sum(parameter.numel() for parameter in dual.parameters())
    print(f"dual encoder with {parameters / 1e6:.1f}M parameters in {options.output}")


if __name__ == "__main__":
    run(main)

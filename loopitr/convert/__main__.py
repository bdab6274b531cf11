"""python -m loopitr.convert albef|blip SRC OUT [--tokenizer NAME] [--image-size S] [--vision-heads H] [--text-heads H]

Writes the public checkpoint SRC (ALBEF: a .pth; BLIP: a .pth, a transformers folder or a hub id) as the folder OUT,
which `LoopITRModel.from_pretrained` and, with a tokenizer, `LoopITRProcessor.from_pretrained` load.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from loopitr.cli import run

# Heavy modules are imported where they are used, so that --help works without torch.
CHECKPOINTS = {"albef": "a .pth of ALBEF", "blip": "a .pth of BLIP, a transformers folder of it, or its hub id"}


class OneLineParser(argparse.ArgumentParser):
    """Usage errors as a `ValueError`, which `run` prints in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help shows all options)")


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m loopitr.convert") -> None:
    """Convert one checkpoint and print a line about the result; `program` is the name of this program in `--help`.

    Raises:
        ValueError, OSError: an error that the user can correct.
    """
    options = _parser(program).parse_args(arguments)
    from loopitr.building.folders import check_output
    from loopitr.convert import albef, blip
    from loopitr.convert.weights import save_converted
    from loopitr.models.loop_model import LoopITRModel

    is_blip = options.family == "blip"
    check_output(options.out, LoopITRModel.config_class.model_type)
    convert = blip.convert_blip if is_blip else albef.convert_albef
    model = convert(
        options.source,
        image_size=options.image_size,
        vision_heads=options.vision_heads,
        text_heads=options.text_heads,
    )
    save_converted(
        model,
        options.out,
        tokenizer=options.tokenizer,
        max_length=blip.MAX_LENGTH if is_blip else albef.MAX_LENGTH,
        source=options.source,
    )
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    processor = "" if options.tokenizer else "; no processor, since no --tokenizer was given"
    print(f"{options.family} with {millions:.1f}M parameters in {options.out}{processor}")


def _parser(program: str) -> OneLineParser:
    parser = OneLineParser(prog=program, description="Makes a model folder of a public checkpoint.")
    families = parser.add_subparsers(dest="family", required=True, metavar="albef|blip")
    for family in CHECKPOINTS:
        options = families.add_parser(family, help=f"SRC is {CHECKPOINTS[family]}")
        options.add_argument("source", metavar="SRC", help=CHECKPOINTS[family])
        options.add_argument("out", metavar="OUT", help="folder to write")
        options.add_argument("--tokenizer", help="folder or hub id of the tokenizer to save along: bert-base-uncased")
        options.add_argument("--image-size", type=int, help="pixels per side; unset: as trained")
        options.add_argument("--vision-heads", type=int, help="attention heads of the ViT; unset: width / 64")
        options.add_argument("--text-heads", type=int, help="attention heads of the text layers; unset: width / 64")
    return parser


if __name__ == "__main__":
    run(main)

"""accelerate launch recipes/pretrain.py [--config recipes/configs/X.yaml] [--train.lr 1e-4 ...]

Trains a dual and a cross encoder in a loop. Without a config, data or a model of your own it trains the built-in
`scenes` from scratch (recipes/configs/scenes.yaml). Fine-tuning is the same recipe with `--model.init PATH`; `--resume`
goes on after a kill; `--print_config` shows every option.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loopitr.cli import parse, run
from loopitr.training.launching import start_all_processes
from loopitr.training.options import PretrainOptions

SCENES = Path(__file__).parent / "configs" / "scenes.yaml"
OWN = ("--config", "--model.init", "--model.pair", "--data.karpathy", "--data.albef", "--data.table", "--data.hub")


def main() -> None:
    arguments = sys.argv[1:]
    if not any(a.split("=")[0] in OWN for a in arguments):
        arguments = [f"--config={SCENES}", *arguments]
    options = parse(PretrainOptions, arguments, description=__doc__)
    from loopitr.training.trainer import train  # after the options: --help does without torch

    train(options)


if __name__ == "__main__" and not start_all_processes():
    run(main)

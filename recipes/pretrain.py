"""accelerate launch recipes/pretrain.py [--config recipes/configs/X.yaml] [--train.lr 1e-4 ...]

Trains a dual and a cross encoder in a loop. Without `--config`, data or a model it trains on the built-in `scenes`,
from scratch (recipes/configs/scenes.yaml). Otherwise, data have to be named (`--data.scenes true` for the built-in
ones). `--model.init PATH` fine-tunes a model, `--resume` continues an interrupted run with the same options, and
`--print_config` shows every option.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loopitr.cli import parse, run
from loopitr.data.options import SOURCES, source_of
from loopitr.training.launching import start_all_processes
from loopitr.training.options import PretrainOptions

if TYPE_CHECKING:
    from loopitr.training.trainer import Trainer

SCENES = Path(__file__).parent / "configs" / "scenes.yaml"
OWN = ("--config", "--model.init", "--model.pair", *(f"--data.{source}" for source in SOURCES))


def make_trainer(options: PretrainOptions) -> Trainer:
    """Compose a run of objects, any of which can be your own (recipes/examples)."""
    # These imports are not at the top, so that --help does not wait for torch.
    from loopitr.building.build import build_model
    from loopitr.building.teacher import load_teacher
    from loopitr.data import scene_vocabulary
    from loopitr.objective.build import build_masking, build_objective, build_teacher
    from loopitr.training.setup import all_captions, load_run_records, start
    from loopitr.training.trainer import Trainer

    options = options.decided()
    source_of(options.data)  # If no data are named, this raises an error before a model is built.
    accelerator = start(options.train)
    model, processor = build_model(options.model, vocabulary=scene_vocabulary())
    records = load_run_records(options.data, options.validation, log=accelerator.print)
    masking = build_masking(processor.tokenizer, options.objective, all_captions(records.train))
    teacher = build_teacher(options.objective, model, load=partial(load_teacher, processor=processor))
    objective = build_objective(model, options.objective, masking=masking, teacher=teacher)
    return Trainer(
        objective,
        processor,
        records.train,
        records.val,
        options.train,
        data=options.data,
        validation=options.validation,
        test=records.test,
        test_split=records.test_split,
        accelerator=accelerator,
        config=asdict(options),
        resume=options.resume,
        resume_with_changes=options.resume_with_changes,
    )


def main() -> None:
    arguments = sys.argv[1:]
    if not any(a.split("=")[0] in OWN for a in arguments):
        arguments = [f"--config={SCENES}", *arguments]
    make_trainer(parse(PretrainOptions, arguments, description=__doc__)).run()


if __name__ == "__main__" and not start_all_processes():
    run(main)

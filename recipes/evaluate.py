"""python recipes/evaluate.py --model RUN --data.karpathy FILE.json --data.images DIR --data.split test --rerank 64

Recall@1/5/10 in both directions, by the dual head alone and with its best candidates reranked. RUN is a run folder, an
exported dual encoder (with `--rerank 0`) or a hub id. `--data.scenes true` is the built-in data, and need not
be given for a RUN on it.
For scenes, whose ground truth is exact, also nDCG@10, mAP@R and how stable rankings are between paraphrases.
A table or an ALBEF list without splits is evaluated whole; of the one that RUN was trained on, what RUN held out.
Images that RUN was trained on are found by their content and named.
`--output metrics.json` keeps the figures; `--help` shows every option. `accelerate launch --num_processes 8
recipes/evaluate.py ...` (`--cpu`: without a GPU) gives the same figures sooner.
"""

import sys
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loopitr.checks import usable_device
from loopitr.cli import check_output_file, parse, run
from loopitr.data import DataOptions, LoadReport, load_evaluated, trained_data, training_overlap
from loopitr.training.launching import start_all_processes
from loopitr.training.reporting import write_json

# What the options do without is imported where it is used, so that --help does not wait for it. Annotations with it are
# quoted one by one: were all of them postponed, jsonargparse would import what stands here.
if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from accelerate import PartialState

    from loopitr.building.folders import Saved
    from loopitr.data import Record, TokenCache
    from loopitr.evaluation.options import EvaluationOptions


@dataclass
class EvaluateOptions:
    """What is measured, on what."""

    model: str
    """Run folder, exported dual encoder, or hub id."""
    data: DataOptions = field(default_factory=lambda: DataOptions(split="test"))
    rerank: int = 64
    """Candidates per query for the fusion head; 0: dual only."""
    captions_per_image: int | None = None
    """Use each image's first so many captions (COCO and Flickr: 5); unset: all."""
    max_images: int | None = None
    """Only the first so many images."""
    batch_size: int = 64
    """Images or captions encoded at a time."""
    image_block: int = 32
    """Images whose tokens are held at a time while reranking."""
    pair_block: int = 1024
    """Pairs scored at a time."""
    token_storage: Literal["auto", "memory", "disk", "recompute"] = "auto"
    """Where image and caption tokens wait between encoding and reranking. auto: in memory up to 1 GiB per process, else
    on disk if there is room, else the backbones run again."""
    token_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What they wait in."""
    token_folder: str | None = None
    """Where `disk` puts them while it runs; unset: the system's temporary folder."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one (of several processes, each its own)."""
    check_overlap: bool = True
    """Look for the evaluated images among those that the model was trained on: by content, where the training files are
    still here. Of a training set only files as long as an evaluated one are read."""
    output: str | None = None
    """JSON file for the figures."""


def main() -> None:
    options = parse(EvaluateOptions, description=__doc__)
    import torch

    from loopitr.building.folders import load_saved
    from loopitr.distributed import first_rank
    from loopitr.evaluation.retrieval import evaluate_retrieval

    state = _state(options.device)
    if options.data.split == "train" and state.is_main_process:
        print("warning: these are figures on the training split; they say nothing about new data", file=sys.stderr)
    device = _device(options.device, state)
    if options.output is not None:
        first_rank(partial(check_output_file, options.output))
    evaluation = _evaluation(options)
    report, history = LoadReport(), trained_data(options.model)
    evaluated = load_evaluated(options.data, report, trained_on=history[0].data)
    records = evaluated.records
    state.print(f"{options.data.split}: {report.summary()}")
    if evaluated.note is not None:
        state.print(evaluated.note)
    saved = load_saved(options.model, dtype=torch.float32)
    saved.model.to(device)  # type: ignore[arg-type]
    with state.main_process_first():
        tokens = _tokens(options.data, saved, records, device, progress=state.is_main_process)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
        result = evaluate_retrieval(saved.model, saved.processor, records, evaluation, tokens=tokens)
    state.print(f"\n{result.table()}\n")
    figures = result.to_json()
    if options.check_overlap and state.is_main_process:
        overlap = training_overlap(records, history)
        print(overlap.line())
        figures["trained_on"] = overlap.to_json()
    if options.output is not None and state.is_main_process:
        path = Path(options.output)
        write_json(path, figures)
        print(f"written to {path}")
    state.destroy_process_group()


def _state(device: str | None) -> "PartialState":
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=1))  # ranks wait for each other's pairs, hours on CPUs


def _device(name: str | None, state: "PartialState") -> "torch.device":
    if state.num_processes > 1 and name not in (None, state.device.type):
        raise ValueError(f"device {name!r}: {state.num_processes} processes have a {state.device.type} each")
    return usable_device(name if name and state.num_processes == 1 else str(state.device))


def _evaluation(options: EvaluateOptions) -> "EvaluationOptions":
    from loopitr.evaluation.options import EvaluationOptions
    from loopitr.evaluation.storage import TokenStorage

    return EvaluationOptions(
        rerank=options.rerank,
        captions_per_image=options.captions_per_image,
        max_images=options.max_images,
        max_skipped_fraction=options.data.max_skipped_fraction,
        batch_size=options.batch_size,
        image_block=options.image_block,
        pair_block=options.pair_block,
        num_workers=options.data.num_workers,
        token_storage=TokenStorage(options.token_storage, options.token_dtype, folder=options.token_folder),
    )


def _tokens(
    options: DataOptions, saved: "Saved", records: "Sequence[Record]", device: "torch.device", *, progress: bool
) -> "TokenCache | None":
    from loopitr.building.build import token_cache_key
    from loopitr.data import TokenCache
    from loopitr.evaluation.gallery import evaluation_transform
    from loopitr.models.loop_model import LoopITRModel

    if options.cache_tokens is None or not isinstance(saved.model, LoopITRModel):
        return None  # a dual encoder alone looks at every image once
    return TokenCache.open_or_build(
        options.cache_tokens,
        key=token_cache_key(saved.model, saved.processor),
        records=records,
        transform=evaluation_transform(saved.processor),
        encode=saved.model.dual.vision,
        num_workers=options.num_workers,
        device=device,
        progress=progress,
    )


if __name__ == "__main__" and not start_all_processes():
    run(main)

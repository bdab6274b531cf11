"""`loopitr evaluate` and `recipes/evaluate.py`: recalls of a saved model on any data."""

import os
import sys
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loopitr.checks import check_at_least, usable_device
from loopitr.cli import check_output_file
from loopitr.data import DataOptions, LoadReport, TrainingOverlap, load_evaluated, trained_data, training_overlap
from loopitr.data.coco_ids import coco_images
from loopitr.durable import write_file
from loopitr.reading import read_object
from loopitr.training.reporting import write_json

from .subcommands import quiet

GALLERY_START = b"<!doctype html>"

# Heavy modules are imported where they are used, so that --help is fast. Annotations with their names are quoted one by
# one: with postponed annotations, jsonargparse would import everything under TYPE_CHECKING.
if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from accelerate import PartialState

    from loopitr.building.folders import Saved
    from loopitr.data import Record, TextTokenCache, TokenCache
    from loopitr.data.trained_on import TrainedOn
    from loopitr.evaluation.coco import CocoBenchmarks
    from loopitr.evaluation.options import EvaluationOptions
    from loopitr.evaluation.report import RetrievalResult


@dataclass
class MeasureOptions:
    """The model, the data, and how to evaluate."""

    model: str
    """Run folder, exported dual encoder, or hub id."""
    data: DataOptions = field(default_factory=lambda: DataOptions(split="test"))
    rerank: int = 64
    """Candidates per query for the fusion head; 0: evaluate the dual head alone."""
    captions_per_image: int | None = None
    """Number of captions to use of each image, the first ones (COCO and Flickr: 5); unset: all."""
    max_images: int | None = None
    """Number of images to use, the first ones; unset: all."""
    batch_size: int = 64
    """Images or captions encoded at a time."""
    image_block: int = 32
    """Images whose tokens are in memory at a time while reranking."""
    pair_block: int = 1024
    """Pairs scored at a time."""
    token_storage: Literal["auto", "memory", "disk", "recompute"] = "auto"
    """Where tokens are stored between encoding and reranking. auto: in memory up to 1 GiB per process, else on disk if
    there is space, else the backbones run again."""
    token_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type in which these tokens are stored."""
    token_folder: str | None = None
    """Folder for `token_storage: disk`; unset: the system's temporary folder."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: use autocast."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one (for several processes, each its own)."""
    check_overlap: bool = True
    """Look for images that the model was trained on, by the content of their files, if the training files still exist.
    Only training files with the size of one of these images are read, and nothing is downloaded. A copy that was
    encoded again is not recognised."""


@dataclass
class EvaluateOptions(MeasureOptions):
    """The model, the data, how to evaluate, and where to write the results."""

    coco_benchmarks: bool = False
    """Also compute ECCV Caption and CxC, for COCO's Karpathy test split; needs the extra `eccv` and
    `captions_per_image` 5."""
    output: str | None = None
    """JSON file for the results."""
    gallery: str | None = None
    """HTML file for a page of queries, with the answers of the dual head and the reranked ones side by side."""
    gallery_queries: int = 16
    """Queries of each direction on that page: some that reranking gains, loses, and does not change."""


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate on all ranks together, print the results, and write them to `options.output` and `options.gallery`.

    Raises:
        ValueError, OSError: the model, the data or the device cannot be used.
    """
    from loopitr.distributed import first_rank
    from loopitr.evaluation.gallery_html import gallery_page

    check_at_least(1, gallery_queries=options.gallery_queries)
    outputs = [Path(name) for name in (options.output, options.gallery) if name is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise ValueError(f"output and gallery are the same file, {options.output}")
    for path in outputs:
        first_rank(partial(check_output_file, path))
        first_rank(partial(_check_replaceable, path))
    examples = 0 if options.gallery is None else options.gallery_queries
    measured = measure(options, examples=examples, coco=_coco(options) if options.coco_benchmarks else None)
    figures = measured.result.to_json()
    overlap = look_for_overlap(options, measured)
    if overlap is not None:
        figures["trained_on"] = overlap.to_json()
    if options.output is not None and measured.state.is_main_process:
        path = Path(options.output)
        write_json(path, figures)
        print(f"written to {path}")
    if options.gallery is not None and measured.state.is_main_process:
        title = f"{options.model}: {options.data.split}"
        write_file(Path(options.gallery), gallery_page(measured.result, measured.records, title=title))
        print(f"gallery in {options.gallery}")
    measured.state.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The model and data of an evaluation, and its result."""

    state: "PartialState"
    saved: "Saved"
    records: "Sequence[Record]"
    history: "list[TrainedOn]"
    result: "RetrievalResult"


def measure(
    options: MeasureOptions, *, calibrate: bool = False, examples: int = 0, coco: "CocoBenchmarks | None" = None
) -> Measured:
    """Load model and data, evaluate, and print the table.

    Args:
        calibrate: fit the similarity weight of the reranking score on these data.
        examples: the number of example queries of each direction in the result.
        coco: also compute ECCV Caption and CxC.

    Raises:
        ValueError, OSError: the model, the data or the device cannot be used.
    """
    import torch

    from loopitr.building.folders import load_saved, model_source
    from loopitr.evaluation.retrieval import evaluate_retrieval

    quiet()
    model_source(options.model)  # A wrong name is reported before the data are read.
    state = _state(options.device)
    if options.data.split == "train" and state.is_main_process:
        print("warning: this is the training split; the results say nothing about new data", file=sys.stderr)
    device = _device(options.device, state)
    evaluation = _evaluation(options, calibrate=calibrate, examples=examples)
    report, history = LoadReport(), trained_data(options.model)
    evaluated = load_evaluated(options.data, report, trained_on=history[0].data)
    records = evaluated.records
    state.print(f"{options.data.split}: {report.summary()}")
    if evaluated.note is not None:
        state.print(evaluated.note)
    saved = load_saved(options.model, dtype=torch.float32)
    saved.model.to(device)  # type: ignore[arg-type]
    evaluation = replace(evaluation, dims=tuple(saved.model.config.matryoshka_dims or ()))
    with state.main_process_first():
        tokens = _tokens(options.data, saved, records, device, progress=state.is_main_process)
        texts = _text_tokens(options.data, saved, records, progress=state.is_main_process)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
        result = evaluate_retrieval(
            saved.model, saved.processor, records, evaluation, tokens=tokens, text_tokens=texts, coco=coco
        )
    state.print(f"\n{result.table()}\n")
    return Measured(state=state, saved=saved, records=records, history=history, result=result)


def _check_replaceable(path: Path) -> None:
    """Check that an output does not exist, is empty, or is that of an earlier evaluation.

    Raises:
        ValueError: it is another file, such as the table that is evaluated on or the metrics of a run.
    """
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        if file.read(len(GALLERY_START)) == GALLERY_START:
            return
    try:
        figures = read_object(path)
    except (OSError, ValueError):
        figures = {}
    if "num_images" not in figures or "training" in figures:  # A run's metrics.json has both.
        raise ValueError(f"output {path} exists and is not that of an evaluation: delete it or choose another")


def look_for_overlap(options: MeasureOptions, measured: Measured) -> TrainingOverlap | None:
    """Print which images the model was trained on, on the first rank and if it is asked for."""
    if not options.check_overlap or not measured.state.is_main_process:
        return None
    overlap = training_overlap(measured.records, measured.history)
    print(overlap.line())
    return overlap


def _coco(options: EvaluateOptions) -> "CocoBenchmarks":
    from loopitr.evaluation.coco import CocoBenchmarks

    if options.data.karpathy is None:
        raise ValueError("coco_benchmarks needs data.karpathy, COCO's own file, for the ids of its captions")
    return CocoBenchmarks(coco_images(options.data.karpathy, options.data.split))


def _state(device: str | None) -> "PartialState":
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from loopitr.training.meeting import check_size, meet

    meeting = meet(os.environ)
    cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    # On CPUs, ranks may wait for hours for each other's pairs.
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))
    del meeting  # The process group has been made.
    check_size(os.environ, state.num_processes)
    return state


def _device(name: str | None, state: "PartialState") -> "torch.device":
    if state.num_processes > 1 and name not in (None, state.device.type):
        raise ValueError(f"device {name!r}: {state.num_processes} processes have a {state.device.type} each")
    return usable_device(name if name and state.num_processes == 1 else str(state.device))


def _evaluation(options: MeasureOptions, *, calibrate: bool, examples: int) -> "EvaluationOptions":
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
        calibrate=calibrate,
        examples=examples,
        token_storage=TokenStorage(options.token_storage, options.token_dtype, folder=options.token_folder),
    )


def _tokens(
    options: DataOptions, saved: "Saved", records: "Sequence[Record]", device: "torch.device", *, progress: bool
) -> "TokenCache | None":
    from loopitr.building.keys import token_cache_key
    from loopitr.data import TokenCache
    from loopitr.evaluation.gallery import evaluation_transform
    from loopitr.models.loop_model import LoopITRModel

    if options.cache_tokens is None or not isinstance(saved.model, LoopITRModel):
        return None  # A dual encoder reads every image only once.
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


def _text_tokens(
    options: DataOptions, saved: "Saved", records: "Sequence[Record]", *, progress: bool
) -> "TextTokenCache | None":
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.training.caches import open_text_cache

    if options.cache_text_tokens is None or not isinstance(saved.model, LoopITRModel):
        return None
    saved.model.eval()
    return open_text_cache(saved.model, saved.processor, options.cache_text_tokens, records, progress=progress)

"""The parts that `Trainer` puts together: accelerate and the seed, the records, the model, and the batch loader."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedDataParallelKwargs, is_torch_version, set_seed
from torch import nn
from transformers.utils.logging import disable_progress_bar

from loopitr.data import (
    CaptionDataset,
    Collator,
    HubStream,
    LoadReport,
    Record,
    StreamDataset,
    TrainTransform,
    captions_of,
    load_records,
)
from loopitr.data.loader import EpochLoader
from loopitr.data.options import DataOptions, source_of
from loopitr.distributed import rank
from loopitr.models.processing import interpolation_of
from loopitr.objective.grad_cache import check_batch_statistics
from loopitr.objective.loop_objective import LoopObjective
from loopitr.training.caches import Caches, check_caches
from loopitr.training.options import TrainOptions, ValidationOptions
from loopitr.training.record_checks import record_warnings
from loopitr.training.run_folder import check_run_folder
from loopitr.training.sharding import SHARDED, configure_fsdp, prepare_environment

COMPILED_FROM = "2.8"  # the first version of torch with which `train.compile` was seen to work; 2.6 fails


def start(train: TrainOptions) -> Accelerator:
    """Start accelerate with the run's precision, accumulation and tracker, and seed the weights and dropout.

    Raises:
        ValueError: a tracker that is not installed, an unsupported version or setting of FSDP or of compilation, chunks
            or compilation with sharded weights, or an `output_dir` that holds something other than a run.
    """
    check_run_folder(Path(train.output_dir))
    prepare_environment()
    disable_progress_bar()  # transformers' progress bars for weights would break into the run's own.
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", None: None}.get(train.precision, train.precision),
        gradient_accumulation_steps=train.accumulation,
        log_with=_tracker(train.tracker),
        project_dir=train.output_dir,
        kwargs_handlers=[
            # Ranks wait for each other's part of a validation and for caches, which can take longer than the default.
            InitProcessGroupKwargs(timeout=timedelta(hours=4)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    configure_fsdp(accelerator)
    for option, is_set in (("chunk_size", train.chunk_size is not None), ("compile", train.compile)):
        if is_set and accelerator.distributed_type in SHARDED:
            # FSDP gathers and frees weights around the forward pass of the whole objective, which chunks bypass.
            raise ValueError(f"train.{option} works with DDP, not with {accelerator.distributed_type.value}")
    if train.compile and not is_torch_version(">=", COMPILED_FROM):
        raise ValueError(f"train.compile needs torch {COMPILED_FROM} or newer, this is {torch.__version__}")
    if train.tracker not in ("auto", "none") and not accelerator.log_with:
        raise ValueError(f"train.tracker {train.tracker} is not installed")
    set_seed(train.seed)
    return accelerator


def _tracker(name: str) -> str | None:
    if name == "none":
        return None
    if name == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") else None
    return name


@dataclass(frozen=True)
class RunRecords:
    """The records that a run trains on, selects its best model on (`val`), and is evaluated on at the end (`test`)."""

    train: Sequence[Record] | HubStream
    val: Sequence[Record]
    test: Sequence[Record]
    test_split: str


def load_run_records(
    data: DataOptions, validation: ValidationOptions, *, log: Callable[[str], None] = print
) -> RunRecords:
    """Load all records of a run before it trains, so that a wrong name is reported at once.

    Raises:
        DataError: a source that cannot be read or that has no such split.
    """

    def load(split: str, **changes: Any) -> Any:
        report = LoadReport()
        records = load_records(dataclasses.replace(data, **changes), split, report)
        log(f"{split}: {report.summary()}" if not isinstance(records, HubStream) else f"{split}: streaming")
        return records

    train = load(data.split)
    val = load(data.val_split, streaming=False)  # It is read many times, and ranked as a whole.
    scenes = source_of(data) == "scenes"
    test_split = validation.final_split or ("test" if scenes else data.val_split)
    test = val if test_split == data.val_split else load(test_split, streaming=False)
    if rank() == 0:  # The other ranks would check the same files.
        held_out = {data.val_split: val, test_split: test}
        for line in record_warnings(train, held_out, chooses=data.val_split, max_images=validation.max_images):
            log(line)
    return RunRecords(train, val, test, test_split)


def all_captions(records: Sequence[Record] | HubStream) -> Iterator[str] | None:
    """Every caption of the records in order; None for a stream."""
    if isinstance(records, HubStream):
        return None
    return (caption for position in range(len(records)) for caption in captions_of(records, position))


def _check_teacher_reads(objective: LoopObjective) -> None:
    """
    Raises:
        ValueError: the teacher has its own model, whose image backbone would not give the cached image tokens.
    """
    if objective.own_teacher is None:
        return
    theirs = objective.own_teacher.model.dual.vision.state_dict()
    ours = objective.model.dual.vision.state_dict()
    if theirs.keys() != ours.keys() or not all(torch.equal(theirs[name], ours[name]) for name in ours):
        raise ValueError(
            f"data.cache_tokens holds this model's image tokens, and objective.teacher {objective.own_teacher.name!r} "
            "has another image backbone: leave data.cache_tokens unset"
        )


def count_parameters(model: nn.Module) -> str:
    """A description of how many parameters the model has and how many of them are trained."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return f"{sum(p.numel() for p in parameters) / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained"


def prepare_model(objective: LoopObjective, train: TrainOptions, data: DataOptions) -> None:
    """Freeze the parts that no term trains, and apply the options that concern the model.

    Raises:
        ValueError: caches or chunks that this model does not allow.
    """
    model = objective.model
    if objective.matryoshka_dims is not None:
        model.config.matryoshka_dims = model.dual.config.matryoshka_dims = list(objective.matryoshka_dims) or None
    # DDP demands that every trained parameter is used.
    trains_scores = objective.trained_negatives > 0
    if not trains_scores and not objective.predicts_words and not objective.compares_tokens:
        model.freeze(["fusion"])
    if not trains_scores and not objective.predicts_words:
        model.fusion.requires_grad_(False)
    if model.itm_head is not None and not trains_scores:
        model.itm_head.requires_grad_(False)
    if model.agreement is not None and not trains_scores and not objective.compares_tokens:
        model.agreement.requires_grad_(False)
    if model.mlm_head is not None and not objective.predicts_words:
        model.mlm_head.requires_grad_(False)
    if train.gradient_checkpointing:
        # transformers called it gradient_checkpointing_enable before (5.20 and older).
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        getattr(model, next(name for name in names if hasattr(model, name)))()
    if train.compile:
        model.compile_parts()
    check_caches(model, data)
    if data.cache_tokens:
        _check_teacher_reads(objective)
    if train.chunk_size is not None:
        check_batch_statistics(model.train())
        # By default, scoring handles as many queries at a time as encoding does.
        if objective.pair_block is None:
            objective.pair_block = train.chunk_size * (1 + 2 * objective.miner.num_negatives)


def make_loader(records: Sequence[Record] | HubStream, train: TrainOptions, caches: Caches) -> EpochLoader:
    """The training batches of this rank.

    Raises:
        ValueError: a stream without `train.max_steps`, or data that do not fill one step.
    """
    data, accelerator = caches.data, caches.accelerator
    processor, tokenizer = caches.processor.image_processor, caches.processor.tokenizer
    transform = TrainTransform(
        image_size=caches.model.config.vision["image_size"],
        mean=processor.image_mean,
        std=processor.image_std,
        interpolation=interpolation_of(processor),
        crop_scale=(data.crop_scale_min, 1.0),
        flip=data.flip,
        randaugment=data.randaugment,
    )
    shortest = transform.shortest if data.scaled_decode else None
    dataset: CaptionDataset | StreamDataset
    texts = None if isinstance(records, HubStream) else caches.texts(records)
    if isinstance(records, HubStream):
        if train.max_steps is None:
            raise ValueError("streaming data has no length: give train.max_steps")
        dataset = StreamDataset(
            records,
            transform=transform,
            captions=data.captions,
            seed=train.seed,
            shuffle_buffer=data.shuffle_buffer,
            shortest=shortest,
            num_shards=accelerator.num_processes,
            index=accelerator.process_index,
        )
    else:
        dataset = CaptionDataset(
            records,
            transform=transform,
            captions=data.captions,
            seed=train.seed,
            tokens=caches.views(records, transform, shortest),
            images=caches.images(records, transform.shortest),
            shortest=shortest,
        )
    loader = EpochLoader(
        dataset,
        Collator(tokenizer, max_length=tokenizer.model_max_length, texts=texts),
        batch_size=train.batch_size,
        seed=train.seed,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        num_workers=data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        group=data.group,
        accumulation=train.accumulation,
    )
    if not isinstance(dataset, StreamDataset) and len(loader) < train.accumulation:
        raise ValueError(
            f"{len(dataset)} training examples do not fill one step of {train.batch_size} x "
            f"{accelerator.num_processes} processes x {train.accumulation}; lower train.batch_size"
        )
    return loader

"""A training run's parts, ready to go: model, data, loader, optimiser, all prepared by accelerate."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from timm.layers import convert_sync_batchnorm
from torch.optim.lr_scheduler import LambdaLR

from loopitr.building.build import build_model, token_cache_key
from loopitr.data import (
    CaptionDataset,
    Collator,
    HubStream,
    ImageCache,
    LoadReport,
    Record,
    StreamDataset,
    TokenCache,
    TrainTransform,
    load_records,
    scene_vocabulary,
)
from loopitr.data.cache_folder import make_folder
from loopitr.data.loader import EpochLoader
from loopitr.data.sources import SOURCES
from loopitr.evaluation.retrieval import evaluation_transform
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.processing import LoopITRProcessor, interpolation_of
from loopitr.objective.grad_cache import check_batch_statistics
from loopitr.objective.step import LoopObjective
from loopitr.objective.word_masking import token_masking
from loopitr.training.checkpoints import move_aside
from loopitr.training.optimization import parameter_groups, two_cycles, warmup_cosine, warmup_stable_decay
from loopitr.training.options import PretrainOptions


class Experiment:
    """Everything that the options describe, built and checked before the first step.

    `objective` and `optimizer` are accelerate's, `bare_objective` and `model` what is in them; `scheduler` steps once
    per optimiser step, `total_steps` in all.

    Raises:
        ValueError, OSError: options that do not fit together, or data and weights that cannot be read.
    """

    def __init__(self, options: PretrainOptions) -> None:
        self.options = options
        train = options.train
        self.folder = Path(train.output_dir)
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no", None: None}.get(train.precision, train.precision),
            gradient_accumulation_steps=train.accumulation,
            log_with=_tracker(train.tracker),
            project_dir=train.output_dir,
            kwargs_handlers=[
                # Ranks wait for each other's share of a validation, and for caches: longer than the default.
                InitProcessGroupKwargs(timeout=timedelta(hours=4)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if train.chunk_size is not None and sharded:  # which gather and free weights in a forward pass of their own
            raise ValueError(f"train.chunk_size works with DDP, not with {self.accelerator.distributed_type.value}")
        if train.tracker not in ("auto", "none") and not self.accelerator.log_with:
            raise ValueError(f"train.tracker {train.tracker} is not installed")
        self.log = self.accelerator.print
        set_seed(train.seed)
        self.model, self.processor = self._build()
        self.train_records = self._records(options.data.split)
        self.val_records = self._held_out(options.data.val_split)
        self.final_split, self.final_records = self._final()
        for folder in filter(None, (options.data.cache_images, options.data.cache_tokens)):
            make_folder(folder)
        self._prepare_folder()  # not before: a mistyped path must not move a good run aside
        self.caches: dict[int, TokenCache] = {}
        self.loader = self._loader()
        self._prepare()

    def _prepare_folder(self) -> None:
        self.accelerator.wait_for_everyone()  # to have read model.init, which may lie there
        if self.accelerator.is_main_process:
            if not self.options.resume:
                aside = move_aside(self.folder)
                if aside is not None:
                    self.log(f"moved the earlier run in {self.folder} to {aside}")
            self.folder.mkdir(parents=True, exist_ok=True)
            described = yaml.safe_dump(dataclasses.asdict(self.options), sort_keys=False)
            (self.folder / "config.yaml").write_text(described)
        self.accelerator.wait_for_everyone()

    def _build(self) -> tuple[LoopITRModel, LoopITRProcessor]:
        options = self.options
        scenes = options.model.init is None and options.model.text.name == "scenes"
        model, processor = build_model(options.model, vocabulary=scene_vocabulary() if scenes else None)
        objective = options.objective
        # DDP demands that every trained parameter is used
        if not objective.trains_scores and not objective.mlm:
            model.freeze(["fusion"])
        if not objective.trains_scores:
            model.itm_head.requires_grad_(False)
        if model.mlm_head is not None and not objective.mlm:
            model.mlm_head.requires_grad_(False)
        if options.train.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if options.train.compile:
            model.compile_parts()
        if options.data.cache_tokens and "vision" in (model.config.lora or ()):
            raise ValueError("data.cache_tokens needs tokens that stay the same; the image backbone has LoRA adapters")
        if options.data.cache_tokens and "vision" not in model.frozen:
            raise ValueError("data.cache_tokens needs a frozen image backbone: model.freeze must name vision")
        if options.data.cache_images and options.data.streaming:
            raise ValueError("data.cache_images needs data of known length: it cannot be used with data.streaming")
        if options.data.cache_images and options.data.cache_tokens:
            raise ValueError("data.cache_images is of no use with data.cache_tokens, which reads no image in training")
        if options.train.chunk_size is not None:
            check_batch_statistics(model.train())
        return model, processor

    def _records(self, split: str, **changes: Any) -> Sequence[Record] | HubStream:
        report = LoadReport()
        records = load_records(dataclasses.replace(self.options.data, **changes), split, report)
        self.log(f"{split}: {report.summary()}" if not isinstance(records, HubStream) else f"{split}: streaming")
        return records

    def _held_out(self, split: str) -> Sequence[Record]:
        records = self._records(split, streaming=False)  # it is read many times, and ranked as a whole
        assert not isinstance(records, HubStream)
        return records

    def _final(self) -> tuple[str, Sequence[Record]]:
        """Split of the final table, read before the training so that a wrong name shows at once."""
        data = self.options.data
        scenes = all(getattr(data, source) is None for source in SOURCES)
        split = self.options.validation.final_split or ("test" if scenes else data.val_split)
        return split, self.val_records if split == data.val_split else self._held_out(split)

    def tokens(self, records: Sequence[Record]) -> TokenCache | None:
        """Image tokens of a frozen backbone, computed once by the main process."""
        folder = self.options.data.cache_tokens
        if folder is None:
            return None
        if id(records) not in self.caches:
            with self.accelerator.main_process_first():
                vision = self.model.dual.vision.to(self.accelerator.device).eval()
                self.caches[id(records)] = TokenCache.open_or_build(
                    Path(folder),
                    key=token_cache_key(self.model, self.processor),
                    records=records,
                    transform=evaluation_transform(self.processor),
                    encode=vision,
                    num_workers=self.options.data.num_workers,
                    device=self.accelerator.device,
                    progress=self.accelerator.is_main_process,
                )
        return self.caches[id(records)]

    def _images(self, records: Sequence[Record], shortest: int) -> ImageCache | None:
        """Training images, decoded and shrunk once by the main process."""
        data = self.options.data
        if data.cache_images is None:
            return None
        with self.accelerator.main_process_first():
            return ImageCache.open_or_build(
                data.cache_images,
                records=records,
                shortest=shortest,
                num_workers=data.num_workers,
                progress=self.accelerator.is_main_process,
            )

    def _loader(self) -> EpochLoader:
        data, train = self.options.data, self.options.train
        processor = self.processor.image_processor
        transform = TrainTransform(
            image_size=self.model.config.vision["image_size"],
            mean=processor.image_mean,
            std=processor.image_std,
            interpolation=interpolation_of(processor),
            crop_scale=(data.crop_scale_min, 1.0),
            flip=data.flip,
            randaugment=data.randaugment,
        )
        shortest = transform.shortest if data.scaled_decode else None
        ranks = {"num_shards": self.accelerator.num_processes, "index": self.accelerator.process_index}
        dataset: CaptionDataset | StreamDataset
        if isinstance(self.train_records, HubStream):
            if train.max_steps is None:
                raise ValueError("streaming data has no length: give train.max_steps")
            dataset = StreamDataset(
                self.train_records,
                transform=transform,
                captions=data.captions,
                seed=train.seed,
                shuffle_buffer=data.shuffle_buffer,
                shortest=shortest,
                **ranks,
            )
        else:
            dataset = CaptionDataset(
                self.train_records,
                transform=transform,
                captions=data.captions,
                seed=train.seed,
                tokens=self.tokens(self.train_records),
                images=self._images(self.train_records, transform.shortest),
                shortest=shortest,
            )
        loader = EpochLoader(
            dataset,
            Collator(self.processor.tokenizer, max_length=self.processor.tokenizer.model_max_length),
            batch_size=train.batch_size,
            seed=train.seed,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            num_workers=data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            group=data.group,
        )
        if not isinstance(dataset, StreamDataset) and len(loader) < train.accumulation:
            raise ValueError(
                f"{len(dataset)} training examples do not fill one step of {train.batch_size} x "
                f"{self.accelerator.num_processes} processes x {train.accumulation}; lower train.batch_size"
            )
        return loader

    def _prepare(self) -> None:
        train, accelerator = self.options.train, self.accelerator
        if train.max_steps is not None:
            self.total_steps = train.max_steps
        else:
            self.total_steps = train.epochs * (len(self.loader) // train.accumulation)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            # Batch statistics of all ranks, as of one; torch's own conversion drops timm's fused activations.
            convert_sync_batchnorm(self.model)
        groups = parameter_groups(
            self.model,
            backbone_lr=train.backbone_lr,
            lr=train.lr,
            weight_decay=train.weight_decay,
            lora_lr=train.lora_lr,
        )
        if not groups:
            raise ValueError("nothing to train: model.freeze names every part")
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        options = self.options.objective
        self.bare_objective = LoopObjective(
            self.model,
            options,
            token_masking=token_masking(self.processor.tokenizer, options.mlm_probability),
            pair_block=train.chunk_size and train.chunk_size * (1 + 2 * options.num_negatives),  # of so many queries
        )
        self.objective, self.optimizer = accelerator.prepare(self.bare_objective, optimizer)
        # Not prepared: accelerate would step it once per process.
        self.fusion_start = int(train.fusion_start * self.total_steps)
        self.scheduler = self._scheduler(optimizer)
        accelerator.register_for_checkpointing(self.scheduler)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.log(
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained; "
            f"{self.total_steps} steps of {train.batch_size} x {accelerator.num_processes} x {train.accumulation}"
        )

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        train, steps = self.options.train, self.total_steps
        later = train.backbone_lr if train.loop_backbone_lr is None else train.loop_backbone_lr
        scale = later / train.backbone_lr if train.backbone_lr else 1.0
        parts: dict[str, Any] = {"first": self.fusion_start, "warmup": train.warmup, "backbones": scale}
        if train.schedule == "warmup_stable_decay":
            parts["decay_start"] = train.decay_start
            return warmup_stable_decay(optimizer, steps=steps, floor=train.min_lr, **parts)
        if self.fusion_start:
            return two_cycles(optimizer, steps=steps, floor=train.min_lr, **parts)
        return warmup_cosine(optimizer, steps=steps, warmup=max(1, int(train.warmup * steps)), floor=train.min_lr)


def _tracker(name: str) -> str | None:
    if name == "none":
        return None
    if name == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") else None
    return name

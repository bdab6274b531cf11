"""The training loop, on accelerate: `train(options)` is what `recipes/pretrain.py` runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedDataParallelKwargs, gather_object, send_to_device, set_seed
from timm.layers import convert_sync_batchnorm
from tqdm.auto import tqdm

from loopitr.building import build_model, token_cache_key, token_masking
from loopitr.checkpoints import Progress, load_checkpoint, move_aside, save_checkpoint
from loopitr.data import (
    CaptionDataset,
    Collator,
    HubStream,
    LoadReport,
    Record,
    StreamDataset,
    TokenCache,
    TrainTransform,
    load_records,
    scene_vocabulary,
)
from loopitr.evaluation.retrieval import RetrievalResult, evaluate_retrieval, evaluation_transform
from loopitr.loading import EpochLoader, SkipCounter
from loopitr.model import LoopITRModel
from loopitr.objective import LoopObjective, StepOutput
from loopitr.optimization import parameter_groups, warmup_cosine
from loopitr.options import PretrainOptions
from loopitr.processing import LoopITRProcessor
from loopitr.reporting import History, plot_curves, write_json

SOURCES = ("karpathy", "albef", "table", "hub")


def train(options: PretrainOptions) -> dict[str, Any]:
    """Train, validate, keep the best model; returns what is written to `metrics.json`.

    The run folder gets `config.json`, `model.safetensors` and the processor (the best model), `config.yaml`,
    `metrics.json`, `results.md`, `history.jsonl`, `curves.png` and `checkpoints/`.
    """
    return _Run(options).run()


class _Run:
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
                # The main process validates while the others wait: longer than the default ten minutes.
                InitProcessGroupKwargs(timeout=timedelta(hours=4)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        if train.tracker not in ("auto", "none") and not self.accelerator.log_with:
            raise ValueError(f"train.tracker {train.tracker} is not installed")
        self.log = self.accelerator.print
        set_seed(train.seed)
        self.model, self.processor = self._build()
        self.train_records = self._records(options.data.split)
        self.val_records = self._held_out(options.data.val_split)
        self.final_split, self.final_records = self._final()
        self._prepare_folder()  # not before: a mistyped path must not move a good run aside
        self.caches: dict[int, TokenCache] = {}
        self.loader = self._loader()
        self._prepare()

    # Set-up

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
        if not objective.itm and not objective.mlm:
            model.freeze(["fusion"])
        if not objective.itm:
            model.itm_head.requires_grad_(False)
        if model.mlm_head is not None and not objective.mlm:
            model.mlm_head.requires_grad_(False)
        if options.train.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if options.data.cache_tokens and "vision" not in model.frozen:
            raise ValueError("data.cache_tokens needs a frozen image backbone: model.freeze must name vision")
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

    def _tokens(self, records: Sequence[Record]) -> TokenCache | None:
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

    def _loader(self) -> EpochLoader:
        data, train = self.options.data, self.options.train
        processor = self.processor.image_processor
        transform = TrainTransform(
            image_size=self.model.config.vision["image_size"],
            mean=processor.image_mean,
            std=processor.image_std,
            crop_scale=(data.crop_scale_min, 1.0),
            flip=data.flip,
            randaugment=data.randaugment,
        )
        ranks = {"num_shards": self.accelerator.num_processes, "index": self.accelerator.process_index}
        dataset: CaptionDataset | StreamDataset
        if isinstance(self.train_records, HubStream):
            if train.max_steps is None:
                raise ValueError("streaming data has no length: give train.max_steps")
            dataset = StreamDataset(
                self.train_records, transform=transform, captions=data.captions, seed=train.seed, **ranks
            )
        else:
            dataset = CaptionDataset(
                self.train_records,
                transform=transform,
                captions=data.captions,
                seed=train.seed,
                tokens=self._tokens(self.train_records),
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
            self.model, backbone_lr=train.backbone_lr, lr=train.lr, weight_decay=train.weight_decay
        )
        if not groups:
            raise ValueError("nothing to train: model.freeze names every part")
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        objective = LoopObjective(
            self.model, self.options.objective, token_masking=token_masking(self.processor)
        )
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        # Not prepared: accelerate would step it once per process.
        self.scheduler = warmup_cosine(
            optimizer, steps=self.total_steps, warmup=max(1, int(train.warmup * self.total_steps))
        )
        accelerator.register_for_checkpointing(self.scheduler)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.log(
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained; "
            f"{self.total_steps} steps of {train.batch_size} x {accelerator.num_processes} x {train.accumulation}"
        )

    # The loop

    def run(self) -> dict[str, Any]:
        accelerator, options = self.accelerator, self.options
        progress = None
        if options.resume:
            progress = load_checkpoint(accelerator, self.folder / "checkpoints")
            where = f"step {progress.step}" if progress else f"scratch: no checkpoint in {self.folder}"
            self.log(f"resuming from {where}")
        self.progress = progress or Progress()
        if accelerator.is_main_process:
            self.history = History(self.folder, keep=self.progress.rows)
        if accelerator.log_with:
            accelerator.init_trackers("logs")
        self.skips = SkipCounter(max_fraction=options.data.max_skipped_fraction, log=print)  # of every rank
        started = time.perf_counter()
        with tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            desc="training",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        ) as bar:
            while self.progress.step < self.total_steps:
                self._epoch(bar)
        self._validate()
        seconds = time.perf_counter() - started
        metrics = self._finish(seconds)
        accelerator.end_training()
        return metrics

    def _epoch(self, bar: tqdm) -> None:
        options, progress = self.options, self.progress
        self.objective.train()
        sums: dict[str, torch.Tensor] = {}
        micro, counted = 0, 0
        batches = 0
        for batch in self.loader.epoch(progress.epoch, start=progress.batch):
            batches += 1
            self.skips.update(batch)
            batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
            micro += 1
            last = micro == options.train.accumulation
            output = self._backward(batch, last=last)
            progress.batch += 1
            counted += 1
            for name, value in self._named(output).items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
            if not last:
                continue
            micro = 0
            self._step()
            bar.update()
            if progress.step % options.train.log_every == 0 or progress.step == self.total_steps:
                self._log(bar, {name: float(value) / counted for name, value in sums.items()})
                sums, counted = {}, 0
            every = options.validation.every_steps
            if every and progress.step % every == 0 and progress.step < self.total_steps:
                self._validate()
            if options.train.checkpoint_every and progress.step % options.train.checkpoint_every == 0:
                self._checkpoint()
            if progress.step >= self.total_steps:
                return
        if batches == 0 and progress.batch == 0:
            raise ValueError("the training data gave not one full batch")
        self.optimizer.zero_grad()  # of batches that did not fill an accumulated step
        progress.epoch, progress.batch = progress.epoch + 1, 0
        every = options.validation.every_epochs
        if self.loader.sampler is None:
            return  # ranks reach the end of their streams at different steps: nothing that they do together
        if every and progress.epoch % every == 0 and progress.step < self.total_steps:
            self._validate()

    def _backward(self, batch: dict[str, Any], *, last: bool) -> StepOutput:
        train, accelerator = self.options.train, self.accelerator
        warmup = train.distillation_warmup * self.total_steps
        scale = min(1.0, (self.progress.step + 1) / warmup) if warmup > 0 else 1.0
        with nullcontext() if last else accelerator.no_sync(self.objective):
            output: StepOutput = self.objective(**batch, distillation_scale=scale)  # accelerate's autocast inside
            if not math.isfinite(float(output.loss.detach())):
                values = ", ".join(f"{name} {float(value):.3g}" for name, value in output.terms.items())
                raise ValueError(
                    f"the loss is {float(output.loss.detach())} at step {self.progress.step + 1} ({values}); "
                    "lower the learning rate or use fp32"
                )
            accelerator.backward(output.loss)  # divides by the accumulation
        return output

    def _step(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.accelerator.clip_grad_norm_(parameters, self.options.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.progress.step += 1

    @staticmethod
    def _named(output: StepOutput) -> dict[str, torch.Tensor]:
        terms = {f"loss/{name}": value for name, value in output.terms.items()}
        return {"loss/total": output.loss, **terms, **{f"train/{k}": v for k, v in output.metrics.items()}}

    def _log(self, bar: tqdm, values: dict[str, float]) -> None:
        values["train/lr"] = float(self.scheduler.get_last_lr()[-1])
        values["train/skipped"] = float(self.skips.report.skipped)
        values["train/truncated"] = float(self.skips.truncated)
        shown = {name.removeprefix("loss/"): f"{v:.3f}" for name, v in values.items() if name.startswith("loss/")}
        bar.set_postfix(shown)
        self._record(values)

    def _record(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.history.add(self.progress.step, values)
        self.accelerator.log(values, step=self.progress.step)

    # Validation and saving

    def _evaluate(self, model: LoopITRModel, records: Sequence[Record], *, final: bool) -> RetrievalResult:
        validation = self.options.validation
        rerank = validation.final_rerank if final else validation.rerank
        return evaluate_retrieval(
            model,
            self.processor,
            records,
            rerank=rerank if self.options.objective.scores_pairs else 0,
            batch_size=validation.batch_size,
            num_workers=self.options.data.num_workers,
            max_images=None if final else validation.max_images,
            max_skipped_fraction=self.options.data.max_skipped_fraction,
            tokens=self._tokens(records),
        )

    def _validate(self) -> None:
        """Measure, and keep the model if it is the best so far. The main process works, the others wait."""
        self._tokens(self.val_records)  # the first time, all ranks meet here
        if self.accelerator.is_main_process:
            scores = self._evaluate(self.model, self.val_records, final=False).mean_r1()
            chosen = self.options.validation.select
            if chosen == "auto":
                chosen = "match_plus_similarity" if "match_plus_similarity" in scores else "dual"
            self.log(f"step {self.progress.step}: mean R@1 " + ", ".join(f"{k} {v:.1f}" for k, v in scores.items()))
            if self.progress.best is None or scores[chosen] > self.progress.best:
                self.progress.best, self.progress.best_step = scores[chosen], self.progress.step
                self.model.save_pretrained(self.folder)
                self.processor.save_pretrained(self.folder)
            self._record({f"val/{name}": value for name, value in scores.items()})
        self.accelerator.wait_for_everyone()
        self.objective.train()

    def _checkpoint(self) -> None:
        progress = dataclasses.replace(self.progress)
        progress.skipped, progress.truncated = self._lost()
        if self.accelerator.is_main_process:
            progress.rows = len(self.history.rows)
        save_checkpoint(
            self.accelerator, self.folder / "checkpoints", progress, keep=self.options.train.keep_checkpoints
        )

    def _lost(self) -> tuple[dict[str, int], int]:
        """What was skipped, and how many captions were cut, on all ranks since the very start of the run."""
        skipped, truncated = Counter(self.progress.skipped), self.progress.truncated
        for counts, cut in gather_object([(self.skips.report.counts, self.skips.truncated)]):
            skipped.update(counts)
            truncated += cut
        return dict(skipped), truncated

    def _finish(self, seconds: float) -> dict[str, Any]:
        """Evaluate the best model on the final split and write the results."""
        split, records = self.final_split, self.final_records
        self._tokens(records)
        skipped, truncated = self._lost()
        metrics: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            model = LoopITRModel.from_pretrained(self.folder).to(self.accelerator.device)
            result = self._evaluate(model, records, final=True)
            metrics = {
                "split": split,
                **result.to_json(),
                "training": {
                    "seconds": round(seconds, 1),
                    "steps": self.progress.step,
                    "best_step": self.progress.best_step,
                    "best_val_mean_r1": self.progress.best,
                    "skipped": skipped,
                    "truncated_captions": truncated,
                },
            }
            write_json(self.folder / "metrics.json", metrics)
            (self.folder / "results.md").write_text(f"# {self.folder.name}: {split}\n\n{result.table()}\n")
            plot_curves(self.history.rows, self.folder / "curves.png")
            self.log(f"\n{result.table()}\n\nsaved in {self.folder}, trained in {seconds:.0f} s")
        self.accelerator.wait_for_everyone()
        return metrics


def _tracker(name: str) -> str | None:
    if name == "none":
        return None
    if name == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") else None
    return name

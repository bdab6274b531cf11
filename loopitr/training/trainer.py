"""The training loop, on accelerate: `train(options)` is what `recipes/pretrain.py` runs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from tqdm.auto import tqdm

from loopitr.data import LoadReport, Record
from loopitr.data.loader import SkipCounter
from loopitr.distributed import average_gradients
from loopitr.evaluation.retrieval import RetrievalResult, evaluate_retrieval
from loopitr.memory import trim_memory
from loopitr.models.loop_model import LoopITRModel
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.step import StepOutput
from loopitr.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from loopitr.training.options import PretrainOptions
from loopitr.training.reporting import History, plot_curves, write_json
from loopitr.training.setup import Experiment

TRIM_EVERY = 10  # steps; on the CPU


def train(options: PretrainOptions) -> dict[str, Any]:
    """Train, validate, keep the best model; returns what is written to `metrics.json`.

    The run folder gets `config.json`, `model.safetensors` and the processor (the best model), `config.yaml`,
    `metrics.json`, `results.md`, `history.jsonl`, `curves.png` and `checkpoints/`.
    """
    return _Loop(Experiment(options)).run()


class _Loop:
    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.options, self.accelerator, self.log = experiment.options, experiment.accelerator, experiment.log
        self.folder, self.total_steps = experiment.folder, experiment.total_steps
        self.fusion_start = experiment.fusion_start

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
        self.micro = 0  # batches of the step that is being accumulated
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
                self._check_skips()
        self._validate()
        seconds = time.perf_counter() - started
        metrics = self._finish(seconds)
        accelerator.end_training()
        return metrics

    def _epoch(self, bar: tqdm) -> None:
        options, progress = self.options, self.progress
        self.experiment.objective.train()
        logged: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        batches = 0
        for batch in self.experiment.loader.epoch(progress.epoch, start=progress.batch):
            batches += 1
            self.skips.update(batch)
            inputs = send_to_device(batch.inputs, self.accelerator.device, non_blocking=True)
            self.micro += 1
            last = self.micro == options.train.accumulation
            output = self._backward(inputs, last=last)
            progress.batch += 1
            for name, value in self._named(output).items():
                logged[name].append(value.detach())
            if not last:
                continue
            self.micro = 0
            self._step()
            bar.update()
            if progress.step % options.train.log_every == 0 or progress.step == self.total_steps:
                self._log(bar, {name: torch.stack(values).mean() for name, values in logged.items()})
                logged.clear()
            every = options.validation.every_steps
            if every and progress.step % every == 0 and progress.step < self.total_steps:
                self._validate()
            if options.train.checkpoint_every and progress.step % options.train.checkpoint_every == 0:
                self._checkpoint()
            if progress.step >= self.total_steps:
                return
        if batches == 0 and progress.batch == 0:
            raise ValueError("the training data gave not one full batch")
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if self.experiment.loader.sampler is None:
            return  # ranks reach the end of their streams at different batches: nothing ends that they do together
        self.micro = 0
        self.experiment.optimizer.zero_grad()  # of batches that did not fill an accumulated step
        every = options.validation.every_epochs
        if every and progress.epoch % every == 0 and progress.step < self.total_steps:
            self._validate()

    def _backward(self, batch: dict[str, Any], *, last: bool) -> StepOutput:
        train, accelerator = self.options.train, self.accelerator
        warmup = train.distillation_warmup * self.total_steps
        scale = min(1.0, (self.progress.step + 1 - self.fusion_start) / warmup) if warmup > 0 else 1.0
        stage: dict[str, Any] = {"distillation_scale": scale, "with_pairs": self.progress.step >= self.fusion_start}
        chunk_size = train.chunk_size
        with nullcontext() if last and chunk_size is None else accelerator.no_sync(self.experiment.objective):
            if chunk_size is None:
                output = self.experiment.objective(**batch, **stage)  # autocast is inside
                self._backward_from(output)
            else:
                output = cached_backward(
                    self.experiment.bare_objective,
                    batch,
                    chunk_size=chunk_size,
                    backward=self._backward_from,
                    autocast=accelerator.autocast,
                    **stage,
                )
        if last and chunk_size is not None:
            average_gradients(self._parameters)
        return output

    def _backward_from(self, output: StepOutput) -> None:
        if not math.isfinite(float(output.loss.detach())):
            values = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in output.terms.items())
            raise ValueError(
                f"the loss is {float(output.loss.detach())} at step {self.progress.step + 1} ({values}); "
                "lower the learning rate or use fp32"
            )
        self.accelerator.backward(output.loss)  # divides by the accumulation

    @property
    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.experiment.optimizer.param_groups for p in group["params"]]

    def _step(self) -> None:
        self.accelerator.clip_grad_norm_(self._parameters, self.options.train.clip)
        self.experiment.optimizer.step()
        self.experiment.optimizer.zero_grad()
        self.experiment.scheduler.step()
        self.progress.step += 1
        if self.accelerator.device.type == "cpu" and self.progress.step % TRIM_EVERY == 0:
            trim_memory()

    @staticmethod
    def _named(output: StepOutput) -> dict[str, torch.Tensor]:
        terms = {f"loss/{name}": value for name, value in output.terms.items()}
        return {"loss/total": output.loss, **terms, **{f"train/{k}": v for k, v in output.metrics.items()}}

    def _log(self, bar: tqdm, means: dict[str, torch.Tensor]) -> None:
        """Of all ranks: some terms are of a rank's own queries."""
        averaged = self.accelerator.reduce(torch.stack([value.float() for value in means.values()]), "mean")
        lost = torch.tensor([self.skips.report.skipped, self.skips.truncated], device=averaged.device)
        skipped, truncated = self.accelerator.reduce(lost, "sum").tolist()
        values = dict(zip(means, averaged.tolist(), strict=True))
        values["train/lr"] = float(self.experiment.scheduler.get_last_lr()[-1])
        values["train/skipped"] = float(sum(self.progress.skipped.values()) + skipped)
        values["train/truncated"] = float(self.progress.truncated + truncated)
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
        started = not self.fusion_start or self.progress.step > self.fusion_start
        tokens = self.experiment.tokens(records)  # in float32, whatever the precision of the run that computes them
        with self.accelerator.autocast():
            return evaluate_retrieval(
                model,
                self.experiment.processor,
                records,
                rerank=rerank if self.options.objective.scores_pairs and started else 0,
                batch_size=validation.batch_size,
                num_workers=self.options.data.num_workers,
                max_images=None if final else validation.max_images,
                max_skipped_fraction=self.options.data.max_skipped_fraction,
                tokens=tokens,
            )

    def _validate(self) -> None:
        """Measure, all ranks together, and keep the model if it is the best so far."""
        scores = self._evaluate(self.experiment.model, self.experiment.val_records, final=False).mean_r1()
        chosen = self.options.validation.select
        if chosen == "auto":
            reranks = self.options.objective.scores_pairs and self.options.validation.rerank > 0
            chosen = "match_plus_similarity" if reranks else "dual"
        self.log(f"step {self.progress.step}: mean R@1 " + ", ".join(f"{k} {v:.1f}" for k, v in scores.items()))
        score = scores.get(chosen, -math.inf)  # the fusion head may not have started
        if score > (-math.inf if self.progress.best is None else self.progress.best):
            self.progress.best, self.progress.best_step = score, self.progress.step
            if self.accelerator.is_main_process:
                self.experiment.model.save_pretrained(self.folder)
                self.experiment.processor.save_pretrained(self.folder)
        self._record({f"val/{name}": value for name, value in scores.items()})
        self.accelerator.wait_for_everyone()
        self.experiment.objective.train()

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

    def _check_skips(self) -> None:
        """Judge data of fewer examples than `SkipCounter` waits for, once the ranks have read all of it."""
        sampler, accumulation = self.experiment.loader.sampler, self.options.train.accumulation
        if sampler is None or self.skips.batches < len(sampler) // accumulation * accumulation:
            return
        report, seen = LoadReport(), 0
        for part, count in gather_object([(self.skips.report, self.skips.seen)]):
            report.merge_skips(part)
            seen += count
        report.check(self.skips.max_fraction, seen=seen)

    def _finish(self, seconds: float) -> dict[str, Any]:
        """Evaluate the best model on the final split, all ranks together, and write the results."""
        skipped, truncated = self._lost()
        model = LoopITRModel.from_pretrained(self.folder).to(self.accelerator.device)
        result = self._evaluate(model, self.experiment.final_records, final=True)
        metrics = {
            "split": self.experiment.final_split,
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
        if self.accelerator.is_main_process:
            write_json(self.folder / "metrics.json", metrics)
            (self.folder / "results.md").write_text(f"# {self.folder.name}: {metrics['split']}\n\n{result.table()}\n")
            plot_curves(self.history.rows, self.folder / "curves.png")
            self.log(f"\n{result.table()}\n\nsaved in {self.folder}, trained in {seconds:.0f} s")
        self.accelerator.wait_for_everyone()
        return metrics

"""The training loop, on accelerate: `Trainer(objective, processor, train, val, options).run()`."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.layers import convert_sync_batchnorm
from tqdm.auto import tqdm

from loopitr.data import HubStream, Record
from loopitr.data.loader import SkipCounter
from loopitr.data.sources import DataOptions
from loopitr.distributed import average_gradients
from loopitr.memory import trim_memory
from loopitr.models.processing import LoopITRProcessor
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.parts import StepOutput
from loopitr.training.checkpoints import Progress, load_checkpoint, save_checkpoint
from loopitr.training.divergence import check_finite, check_finite_loss
from loopitr.training.gate import Gate
from loopitr.training.optimization import make_optimizer, make_scheduler
from loopitr.training.options import RunOptions, TrainOptions, ValidationOptions
from loopitr.training.reporting import History, named_values, run_metrics, write_results
from loopitr.training.run_folder import CHECKPOINTS, run_folder, store_config
from loopitr.training.setup import Caches, check_sharding, count_parameters, make_loader, prepare_model, start
from loopitr.training.skips import check_skips, files_in_all, lost_in_all, lost_so_far
from loopitr.training.validation import Validator

TRIM_EVERY = 10  # On the CPU, memory is given back after so many steps.


class Trainer:
    """Trains an objective's model, validates it, keeps the best one.

    Everything is built and checked when the trainer is made; nothing is written to the run folder before `run`. Of its
    attributes, `objective` and `optimizer` are accelerate's, `bare_objective` and `model` what is in them.

    Example (`model` and `processor` as in the example of `build_model`):
        >>> import tempfile
        >>> from PIL import Image
        >>> from loopitr import DataOptions, LoopObjective, Record, Trainer, TrainOptions
        >>> images = {color: Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue", "white")}
        >>> cards = [Record(image=image, captions=(f"a {color} card",)) for color, image in images.items()]
        >>> folder, data = tempfile.TemporaryDirectory(), DataOptions(num_workers=0)
        >>> options = TrainOptions(output_dir=folder.name + "/run", batch_size=4, epochs=1, tracker="none")
        >>> trainer = Trainer(LoopObjective(model), processor, cards, cards, options, data=data)
        1.1M parameters, 1.1M trained; 1 steps of 4 x 1 x 1
        >>> metrics = trainer.run()  # doctest: +ELLIPSIS
        step 1: ...
        >>> metrics["num_images"]
        4
    """

    def __init__(
        self,
        objective: LoopObjective,
        processor: LoopITRProcessor,
        train: Sequence[Record] | HubStream,
        val: Sequence[Record],
        options: TrainOptions | None = None,
        *,
        data: DataOptions | None = None,
        validation: ValidationOptions | None = None,
        test: Sequence[Record] | None = None,
        test_split: str = "val",
        accelerator: Accelerator | None = None,
        config: dict[str, Any] | None = None,
        resume: bool = False,
        resume_with_changes: bool = False,
    ) -> None:
        """
        Args:
            train, val: records (a list will do), or a stream to train on.
            data: how records become batches (augmentation, workers, caches); its source is not looked at.
            test, test_split: what the final table is about, and its name; None: `val`.
            accelerator: what `start` returned, if the caller needed it earlier; it must then be of these `options`.
            config: what is written to `config.yaml`; None: the options given here.
            resume: continue from the newest checkpoint in `options.output_dir`, with the options it was begun with;
                `resume_with_changes`: with any.

        Raises:
            ValueError, OSError: options that do not fit together, or data that cannot be read.
        """
        self.options = options or TrainOptions()
        self.data, self.validation = data or DataOptions(), validation or ValidationOptions()
        self.config = config or dataclasses.asdict(RunOptions(self.options, self.data, self.validation))
        self.resume, self.with_changes = resume or resume_with_changes, resume_with_changes
        self.folder = Path(self.options.output_dir)
        self.accelerator = accelerator or start(self.options)
        self.log = self.accelerator.print
        self.bare_objective, self.model, self.processor = objective, objective.model, processor
        self.test, self.test_split = val if test is None else test, test_split
        check_sharding(objective, self.accelerator)
        prepare_model(objective, self.options, self.data)
        self.caches = Caches(self.model, processor, self.data, self.accelerator)
        self.loader = make_loader(train, self.options, self.caches)
        self._prepare()
        warmup = self.options.distillation_warmup * self.total_steps
        self.gate = Gate(objective, fusion_start=self.fusion_start, warmup=warmup, log=self.log)
        self.validator = Validator(
            objective, self.caches, self.validation, folder=self.folder, records=val, fusion_start=self.fusion_start
        )

    def _prepare(self) -> None:
        options, accelerator = self.options, self.accelerator
        self.total_steps = options.max_steps or options.epochs * (len(self.loader) // options.accumulation)
        self.fusion_start = int(options.fusion_start * self.total_steps)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            # Batch statistics are those of all ranks. torch's own conversion would drop timm's fused activations.
            convert_sync_batchnorm(self.model)
        optimizer = make_optimizer(self.model, options)
        self.objective, self.optimizer = accelerator.prepare(self.bare_objective, optimizer)
        # The scheduler is not prepared: accelerate would step it once per process.
        self.scheduler = make_scheduler(optimizer, options, steps=self.total_steps, fusion_start=self.fusion_start)
        sizes = f"{options.batch_size} x {accelerator.num_processes} x {options.accumulation}"
        self.log(f"{count_parameters(self.model)}; {self.total_steps} steps of {sizes}")

    def run(self) -> dict[str, Any]:
        """Train to the end; returns what is written to `metrics.json`.

        The run folder gets `config.json`, `model.safetensors` and the processor (the best model), `config.yaml`,
        `metrics.json`, `results.md`, `README.md` (the model's card), `history.jsonl`, `curves.png` and `checkpoints/`.
        An earlier run there is moved aside unless it is resumed; resumed after its last step, it is left as it is.
        """
        resuming: dict[str, Any] = {"resume": self.resume, "with_changes": self.with_changes}
        with run_folder(self.folder, self.config, self.accelerator, self.total_steps, **resuming) as finished:
            metrics = self._run() if finished is None else finished
        self.accelerator.end_training()
        return metrics

    def _run(self) -> dict[str, Any]:
        accelerator = self.accelerator
        progress = load_checkpoint(accelerator, self.folder / CHECKPOINTS, scheduler=self.scheduler)
        self.progress = progress or Progress()
        if self.progress.similarity_weight is not None:
            self.model.config.similarity_weight = self.progress.similarity_weight
        self.saved_step = self.progress.step
        if accelerator.is_main_process:
            store_config(self.folder, self.config, step=self.progress.step)
            self.history = History(self.folder, keep=self.progress.rows)
        if accelerator.log_with:
            accelerator.init_trackers("logs")
        self.micro = 0  # Batches so far of the step that is being accumulated.
        known, most = self.progress.skipped_files, self.data.max_skipped_fraction
        self.skips = SkipCounter(max_fraction=most, log=print, known=known)  # Every rank prints.
        started = time.perf_counter()
        with tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            desc="training",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        ) as bar:
            if self.gate.is_used and not self.fusion_start and not self.progress.step:
                self._validate(keep=False)  # A teacher that has learned before teaches from the first step on.
            while self.progress.step < self.total_steps:
                self._epoch(bar)
                check_skips(self.skips, self.loader, accumulation=self.options.accumulation)
        if self.progress.step > self.saved_step:
            self._checkpoint()
        self._validate()
        if warning := self.gate.warning(self.progress):
            self.log(warning)
        return self._finish(time.perf_counter() - started)

    def _epoch(self, bar: tqdm) -> None:
        options, validation, progress = self.options, self.validation, self.progress
        self.objective.train()
        logged: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        batches = 0
        for batch in self.loader.epoch(progress.epoch, start=progress.batch):
            batches += 1
            self.skips.update(batch)
            inputs = send_to_device(batch.inputs, self.accelerator.device, non_blocking=True)
            self.micro += 1
            last = self.micro == options.accumulation
            output = self._backward(inputs, last=last)
            progress.batch += 1
            for name, value in named_values(output).items():
                logged[name].append(value.detach())
            if not last:
                continue
            self.micro = 0
            self._step()
            bar.update()
            if progress.step % options.log_every == 0 or progress.step == self.total_steps:
                self._log(bar, {name: torch.stack(values).mean() for name, values in logged.items()})
                logged.clear()
            every = validation.every_steps
            if every and progress.step % every == 0 and progress.step < self.total_steps:
                self._validate()
            if options.checkpoint_every and progress.step % options.checkpoint_every == 0:
                self._checkpoint()
            if progress.step >= self.total_steps:
                return
        if batches == 0 and progress.batch == 0:
            raise ValueError("the training data gave not one full batch")
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if self.loader.sampler is None:
            return  # Ranks end their streams at different batches, so nothing that they do together ends here.
        self.micro = 0
        self.optimizer.zero_grad()  # The last batches did not fill an accumulated step.
        every = validation.every_epochs
        if every and progress.epoch % every == 0 and progress.step < self.total_steps:
            self._validate()

    def _backward(self, batch: dict[str, Any], *, last: bool) -> StepOutput:
        options, accelerator = self.options, self.accelerator
        stage: dict[str, Any] = {"with_pairs": self.progress.step >= self.fusion_start}
        stage["distillation_scale"] = self.gate.next_scale(self.progress)
        chunk_size = options.chunk_size
        with nullcontext() if last and chunk_size is None else accelerator.no_sync(self.objective):
            if chunk_size is None:
                output = self.objective(**batch, **stage)  # Autocast is inside.
                self._backward_from(output)
            else:
                output = cached_backward(
                    self.bare_objective,
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
        check_finite_loss(output, step=self.progress.step + 1)
        self.accelerator.backward(output.loss)  # This divides by the accumulation.

    @property
    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _step(self) -> None:
        self.accelerator.clip_grad_norm_(self._parameters, self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.bare_objective.after_step()
        self.progress.step += 1
        if self.accelerator.device.type == "cpu" and self.progress.step % TRIM_EVERY == 0:
            trim_memory()

    def _log(self, bar: tqdm, means: dict[str, torch.Tensor]) -> None:
        """Of all ranks: some terms are of a rank's own queries."""
        averaged = self.accelerator.reduce(torch.stack([value.float() for value in means.values()]), "mean")
        values = dict(zip(means, averaged.tolist(), strict=True))
        values["train/lr"] = float(self.scheduler.get_last_lr()[-1])
        values |= lost_so_far(self.progress, self.skips, self.accelerator)
        bar.set_postfix({n.removeprefix("loss/"): f"{v:.3f}" for n, v in values.items() if n.startswith("loss/")})
        self._record(values)

    def _record(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.history.add(self.progress.step, values)
        self.accelerator.log(values, step=self.progress.step)

    # Validation and saving

    def _validate(self, *, keep: bool = True) -> None:
        scores = self.validator.validate(self.progress, keep=keep)
        scores |= self.gate.update(self.progress, scores, self.validator.measure)
        self._record({f"val/{name}": value for name, value in scores.items()})
        self.accelerator.wait_for_everyone()
        self.objective.train()

    def _checkpoint(self) -> None:
        check_finite(self.model, step=self.progress.step)
        progress = dataclasses.replace(self.progress)
        progress.skipped, progress.truncated = lost_in_all(self.progress, self.skips)
        progress.skipped_files = files_in_all(self.progress, self.skips)
        if self.accelerator.is_main_process:
            progress.rows = len(self.history.rows)
        folder, keep = self.folder / CHECKPOINTS, self.options.keep_checkpoints
        save_checkpoint(self.accelerator, folder, progress, keep=keep, scheduler=self.scheduler)
        self.saved_step = progress.step

    def _finish(self, seconds: float) -> dict[str, Any]:
        """Evaluate the best model on the final split, all ranks together, and write the results."""
        lost = lost_in_all(self.progress, self.skips)
        result = self.validator.final(self.test, step=self.progress.step)
        metrics = run_metrics(self.test_split, result, self.progress, seconds, *lost)
        if self.accelerator.is_main_process:
            write_results(self.folder, metrics, result.table(), self.history.rows, self.model)
            self.log(f"\n{result.table()}\n\nsaved in {self.folder}, trained in {seconds:.0f} s")
        self.accelerator.wait_for_everyone()
        return metrics

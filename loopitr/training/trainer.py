"""The training loop, on accelerate: `Trainer(objective, processor, train, val, options).run()`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from loopitr.data import HubStream, Record
from loopitr.data.description import DescribedData
from loopitr.data.loader import SkipCounter
from loopitr.data.options import DataOptions
from loopitr.memory import trim_memory
from loopitr.models.processing import LoopITRProcessor
from loopitr.objective.loop_objective import LoopObjective
from loopitr.training.checkpoints import Progress, load_checkpoint
from loopitr.training.divergence import check_finite
from loopitr.training.gate import Gate
from loopitr.training.optimization import make_optimizer, make_scheduler
from loopitr.training.options import RunOptions, TrainOptions, ValidationOptions
from loopitr.training.reporting import run_metrics, write_results
from loopitr.training.run_folder import run_folder, store_config
from loopitr.training.run_log import RunLog
from loopitr.training.saving import Saver
from loopitr.training.setup import Caches, count_parameters, make_loader, prepare_model, start
from loopitr.training.sharding import WholeModel, ready_for_ranks
from loopitr.training.skips import check_skips, files_in_all, lost_in_all, lost_so_far
from loopitr.training.stepping import Stepper
from loopitr.training.stopping import AcrossRanks, Stopped, Stopping
from loopitr.training.validation import Validator
from loopitr.training.watch import Watch

TRIM_EVERY = 10  # On the CPU, memory is returned to the system after every so many steps.


class Trainer:
    """Trains an objective's model, validates it, and saves the best one.

    The constructor builds and checks everything, and only `run` writes to the run folder. The attributes `objective`
    and `optimizer` are wrapped by accelerate; `bare_objective` and `model` are not.

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
            train, val: sequences of records, such as lists; `train` can also be a stream.
            data: how records become batches (augmentation, workers, caches). Its data source is not used.
            test, test_split: the records of the final table, by default those of `val`, and the name of their split.
            accelerator: what `start` returned for the same `options`, if the caller needed it earlier.
            config: what is written to `config.yaml`, by default the options given here.
            resume: continue from the newest checkpoint in `options.output_dir`, whose run must have had the same
                options.
            resume_with_changes: continue from it with other options.

        Raises:
            ValueError, OSError: options that contradict each other, or data that cannot be read.
        """
        self.options = options = options or TrainOptions()
        self.data, self.validation = data or DataOptions(), validation or ValidationOptions()
        self.config = config or dataclasses.asdict(RunOptions(self.options, self.data, self.validation))
        self.resume, self.with_changes = resume or resume_with_changes, resume_with_changes
        self.folder = Path(options.output_dir)
        self.accelerator = accelerator or start(options)
        self.log = self.accelerator.print
        self.bare_objective, self.model, self.processor = objective, objective.model, processor
        self.test, self.test_split = val if test is None else test, test_split
        self.whole = WholeModel(objective, self.accelerator)
        prepare_model(objective, self.options, self.data)
        self.caches = Caches(self.whole.model, processor, self.data, self.accelerator)
        self.loader = make_loader(train, self.options, self.caches)
        self.described = DescribedData(train=train, val=val)
        self._prepare()
        warmup, end = (part * self.total_steps for part in (options.distillation_warmup, options.distillation_end))
        self.gate = Gate(objective, fusion_start=self.fusion_start, warmup=warmup, end=int(end), log=self.log)
        self.saver = Saver(self.accelerator, self.folder, self.options, scheduler=self.scheduler, log=self.log)
        parts = self.accelerator, self.objective, objective, self.optimizer, self.scheduler, options
        self.stepper = Stepper(*parts, folder=self.folder, total_steps=self.total_steps, log=self.log)
        self.validator = Validator(
            objective, self.whole, self.caches, self.validation, self.folder, val, fusion_start=self.fusion_start
        )

    def _prepare(self) -> None:
        options, accelerator = self.options, self.accelerator
        self.total_steps = options.max_steps or options.epochs * len(self.loader) // options.accumulation
        self.fusion_start = int(options.fusion_start * self.total_steps)
        ready_for_ranks(self.bare_objective, accelerator, seed=options.seed)
        optimizer = make_optimizer(self.model, options)
        self.objective, self.optimizer = accelerator.prepare(self.bare_objective, optimizer)
        # The scheduler is not prepared: accelerate would step it once per process.
        self.scheduler = make_scheduler(optimizer, options, steps=self.total_steps, fusion_start=self.fusion_start)
        sizes = f"{options.batch_size} x {accelerator.num_processes} x {options.accumulation}"
        self.log(f"{count_parameters(self.model)}; {self.total_steps} steps of {sizes}")

    def run(self) -> dict[str, Any]:
        """Train to the end; returns what is written to `metrics.json`.

        The run folder then holds the best model (`config.json`, `model.safetensors` and the processor's files), its
        card (`README.md`), `config.yaml`, `metrics.json`, `results.md`, `gallery.html`, `history.jsonl`, `curves.png`
        and `checkpoints/`. An earlier run in the folder is moved aside unless it is resumed; a finished run that is
        resumed stays as it is. On SIGTERM or Ctrl-C the current step is finished and saved, and `Stopped`, which is a
        `SystemExit`, is raised.
        """
        rest: dict[str, Any] = {"resume": self.resume, "with_changes": self.with_changes, "data": self.described}
        folder = run_folder(self.folder, self.config, self.accelerator, self.total_steps, **rest)
        try:
            with (stopping := Stopping()), folder as entered:
                metrics = entered.finished or self._run(entered.checkpoint, stopping)
        except RuntimeError as error:
            if not stopping.signal:
                raise
            raise self._announce(Stopped(stopping.signal)) from error  # Another rank got the signal and left first.
        except Stopped as stop:
            raise self._announce(stop) from None
        self.accelerator.end_training()
        return metrics

    def _run(self, checkpoint: Path | None, stopping: Stopping) -> dict[str, Any]:
        accelerator = self.accelerator
        self.stopping, self.across_ranks = stopping, AcrossRanks(accelerator.device)
        with stopping.at_once():
            self._begin(checkpoint)
        started = time.perf_counter()
        shown: dict[str, Any] = {"desc": "training", "disable": not accelerator.is_main_process, "dynamic_ncols": True}
        with tqdm(total=self.total_steps, initial=self.progress.step, **shown) as bar:
            if self.gate.is_used and not self.fusion_start and not self.progress.step:
                self._validate(keep=False)  # An already trained teacher teaches from the first step on.
            if self.progress.validates_next:
                self._validate()  # The run was stopped before this validation.
            while self.progress.step < self.total_steps:
                self._epoch(bar)
                check_skips(self.skips, self.loader, accumulation=self.options.accumulation)
        if self.progress.step > self.saver.step:
            self._checkpoint(needed=True)
        with stopping.at_once():
            self._validate()
            if warning := self.gate.warning(self.progress):
                self.log(warning)
            return self._finish(time.perf_counter() - started)

    def _begin(self, checkpoint: Path | None) -> None:
        accelerator = self.accelerator
        teacher = self.bare_objective.own_teacher if self.with_changes else None
        self.progress = Progress()
        if checkpoint:
            self.progress = load_checkpoint(accelerator, checkpoint, scheduler=self.scheduler, teacher=teacher)
        self.validator.resume(self.progress)
        self.saver.step = self.progress.step
        if accelerator.is_main_process:
            store_config(self.folder, self.config, self.described, step=self.progress.step)
        watch = Watch(self.bare_objective, total_steps=self.total_steps, log=self.log)
        self.run_log = RunLog(accelerator, self.folder, self.progress, watch=watch, log=self.log)
        if accelerator.log_with:
            accelerator.init_trackers("logs")
        already, most = self.progress.skipped_files, self.data.max_skipped_fraction
        self.skips = SkipCounter(max_fraction=most, log=print, known=already)  # Every rank prints.

    def _epoch(self, bar: tqdm) -> None:
        progress = self.progress
        self.objective.train()
        batches = 0
        for batch in self.loader.epoch(progress.epoch, start=progress.batch):
            batches += 1
            self.skips.update(batch)
            output = self.stepper.backward(batch, self.gate.stage(self.progress))
            progress.batch += 1
            self.run_log.add(output)
            if not self.stepper.is_full:
                continue
            self._step()
            bar.update()
            self._after_step(bar)
            if progress.step >= self.total_steps:
                return
        if batches == 0 and progress.batch == 0:
            raise ValueError("the training data do not fill a single batch; lower train.batch_size")
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if self.loader.sampler is None:
            return  # Ranks end their streams at different batches, so nothing that needs all ranks may follow.
        every = self.validation.every_epochs
        progress.validates_next = bool(every) and progress.epoch % every == 0
        self._checkpoint()
        if progress.validates_next:
            self._validate()

    def _after_step(self, bar: tqdm) -> None:
        """Log, save, validate or stop if due; after the last step, `_run` saves and validates."""
        options, progress = self.options, self.progress
        is_last = progress.step >= self.total_steps
        if progress.step % options.log_every == 0 or is_last:
            self._log(bar)
        late = self.accelerator.is_main_process and self.saver.is_late()
        stop, late = self.across_ranks.highest(self.stopping.signal, late)
        self.stopping.signal = stop
        every = self.validation.every_steps
        progress.validates_next = bool(every) and progress.step % every == 0 and not is_last
        if stop:
            self._checkpoint(needed=True)
            raise Stopped(stop)
        if progress.validates_next:
            self._validate()
        ends_epoch = self.loader.sampler is not None and progress.batch == len(self.loader)  # `_epoch` then saves.
        if (late or self.saver.is_due(progress.step)) and not ends_epoch and not is_last:
            self._checkpoint()

    def _step(self) -> None:
        self.stepper.step()
        self.progress.step += 1
        if self.accelerator.device.type == "cpu" and self.progress.step % TRIM_EVERY == 0:
            trim_memory()

    def _log(self, bar: tqdm) -> None:
        self.stepper.guard.settle(self.progress)
        extra = {"train/lr": float(self.scheduler.get_last_lr()[-1])}
        extra |= lost_so_far(self.progress, self.skips, self.accelerator)
        if self.progress.bad_steps:
            extra["train/bad_steps"] = float(self.progress.bad_steps)
        values = self.run_log.write(self.progress, extra)
        bar.set_postfix({n.removeprefix("loss/"): f"{v:.3f}" for n, v in values.items() if n.startswith("loss/")})

    # Validation and saving

    def _validate(self, *, keep: bool = True) -> None:
        before = dataclasses.replace(self.progress)
        is_saved = self.saver.step == self.progress.step
        try:
            # Ranks that get a signal leave a validation at different places, so only a saved run may stop there.
            with self.stopping.at_once(is_saved or self.accelerator.num_processes == 1):
                scores = self.validator.validate(self.progress, keep=keep)
                scores |= self.gate.update(self.progress, scores, self.validator.measure)
        except Stopped:
            self.progress = before
            if not is_saved:
                self._checkpoint(needed=True)
            raise
        self.progress.validates_next = False
        self.run_log.record(self.progress.step, {f"val/{name}": value for name, value in scores.items()})
        self.accelerator.wait_for_everyone()
        self.objective.train()

    def _checkpoint(self, *, needed: bool = False) -> None:
        check_finite(self.model, step=self.progress.step)
        self.stepper.guard.settle(self.progress)
        progress = dataclasses.replace(self.progress)
        progress.skipped, progress.truncated = lost_in_all(self.progress, self.skips)
        progress.skipped_files = files_in_all(self.progress, self.skips)
        self.saver.save(progress, needed=needed, first=partial(self.run_log.keep, progress))

    def _announce(self, stop: Stopped) -> Stopped:
        """Log how to continue the run, and end the trackers."""
        self.log(stop.line(self.saver.step, self.folder))
        self.accelerator.end_training()
        return stop

    def _finish(self, seconds: float) -> dict[str, Any]:
        """Evaluate the best model on the final split, all ranks together, and write the results."""
        skipped, truncated = lost_in_all(self.progress, self.skips)
        result = self.validator.final(self.test, step=self.progress.step)
        metrics = run_metrics(self.test_split, result, self.progress, seconds, skipped, truncated)
        if self.run_log.history is not None:
            write_results(self.folder, metrics, result, self.test, self.run_log.history.rows, self.model)
            self.log(f"\n{result.table()}\n\nsaved in {self.folder}, trained in {seconds:.0f} s")
        self.accelerator.wait_for_everyone()
        return metrics

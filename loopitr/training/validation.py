"""Measuring a run: recall on held-out records along the way, the best model kept, the final table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from loopitr.data import Record
from loopitr.data.sources import DataOptions
from loopitr.evaluation.retrieval import EvaluationOptions, RetrievalResult, evaluate_retrieval
from loopitr.models.loop_model import LoopITRModel
from loopitr.objective.loop_objective import LoopObjective
from loopitr.training.caches import Caches
from loopitr.training.checkpoints import Progress
from loopitr.training.options import ValidationOptions


class Validator:
    """Evaluates the model, all ranks together, and keeps the best one in the run folder."""

    def __init__(
        self,
        objective: LoopObjective,
        caches: Caches,
        options: ValidationOptions,
        *,
        folder: Path,
        records: Sequence[Record],
        fusion_start: int = 0,
    ) -> None:
        self.model, self.caches, self.options, self.folder = objective.model, caches, options, folder
        self.records, self.fusion_start = records, fusion_start
        self.uses_pairs = objective.uses_pairs

    @property
    def accelerator(self) -> Accelerator:
        return self.caches.accelerator

    @property
    def data(self) -> DataOptions:
        return self.caches.data

    @property
    def selected(self) -> str:
        """The score whose mean R@1 chooses the best model."""
        if self.options.select != "auto":
            return self.options.select
        return "match_plus_similarity" if self.uses_pairs and self.options.rerank > 0 else "dual"

    def evaluate(
        self, model: LoopITRModel, records: Sequence[Record], *, step: int, final: bool = False
    ) -> RetrievalResult:
        """Recalls of `model` on `records`, reranked once the fusion head has joined."""
        options = self.options
        rerank = options.final_rerank if final else options.rerank
        started = not self.fusion_start or step > self.fusion_start
        # They are computed in float32, whatever the precision of the run.
        tokens, texts = self.caches.tokens(records), self.caches.texts(records)
        with self.accelerator.autocast():
            return evaluate_retrieval(
                model,
                self.caches.processor,
                records,
                EvaluationOptions(
                    rerank=rerank if self.uses_pairs and started else 0,
                    batch_size=options.batch_size,
                    num_workers=self.data.num_workers,
                    max_images=None if final else options.max_images,
                    max_skipped_fraction=self.data.max_skipped_fraction,
                    graded=final,
                ),
                tokens=tokens,
                text_tokens=texts,
            )

    def validate(self, progress: Progress) -> dict[str, float]:
        """Mean R@1 by score; the model is saved, and `progress` says so, if it is the best so far."""
        scores = self.evaluate(self.model, self.records, step=progress.step).mean_r1()
        shown = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
        self.accelerator.print(f"step {progress.step}: mean R@1 {shown}")
        score = scores.get(self.selected, -math.inf)  # the fusion head may not have started
        if score > (-math.inf if progress.best is None else progress.best):
            progress.best, progress.best_step = score, progress.step
            if self.accelerator.is_main_process:
                self.model.save_pretrained(self.folder)
                self.caches.processor.save_pretrained(self.folder)
        return scores

    def final(self, records: Sequence[Record], *, step: int) -> RetrievalResult:
        """The best model on the final records."""
        model: Any = LoopITRModel.from_pretrained(self.folder).to(self.accelerator.device)
        return self.evaluate(model, records, step=step, final=True)

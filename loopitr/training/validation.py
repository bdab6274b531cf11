"""Validation: recall on held-out records during a run, the best model saved, and the final evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from loopitr.building.folders import save_for_use
from loopitr.data import Record
from loopitr.data.options import DataOptions
from loopitr.distributed import first_rank
from loopitr.durable import write_files
from loopitr.evaluation.retrieval import EvaluationOptions, RetrievalResult, evaluate_retrieval
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.processor_files import check_processor_files
from loopitr.objective.loop_objective import LoopObjective
from loopitr.reading import read_object
from loopitr.training.caches import Caches
from loopitr.training.checkpoints import Progress
from loopitr.training.divergence import check_finite
from loopitr.training.options import ValidationOptions
from loopitr.training.sharding import WholeModel


class Validator:
    """Evaluates the model, all ranks together, and keeps the best one in the run folder."""

    def __init__(
        self,
        objective: LoopObjective,
        whole: WholeModel,
        caches: Caches,
        options: ValidationOptions,
        folder: Path,
        records: Sequence[Record],
        *,
        fusion_start: int = 0,
    ) -> None:
        self.whole, self.caches, self.options, self.folder = whole, caches, options, folder
        self.model, self.records, self.fusion_start = objective.model, records, fusion_start
        self.uses_pairs = objective.uses_pairs or objective.compares_tokens
        self.starts_early = objective.compares_tokens  # Token agreement trains a part of match scores from step 1.

    def resume(self, progress: Progress) -> None:
        """Go on from `progress`. If the run folder has lost the best model so far, it is no longer to be surpassed."""
        if progress.similarity_weight is not None:
            self.model.config.similarity_weight = progress.similarity_weight
        lost = None if progress.best is None else first_rank(partial(_fault, self.folder))
        if lost is not None:
            progress.best = progress.best_dual = None
            self.accelerator.print(
                f"warning: the best model so far, of step {progress.best_step}, is lost ({lost}); the best one "
                "from here on will be kept"
            )

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
        return "reranked" if self.uses_pairs and self.options.rerank > 0 else "dual"

    def evaluate(
        self,
        model: LoopITRModel,
        records: Sequence[Record],
        *,
        step: int,
        final: bool = False,
        calibrate: bool = False,
        cached_texts: bool = True,
    ) -> RetrievalResult:
        """Recalls of `model` on `records`, reranked once a part of the match score is trained.

        Args:
            final: evaluate as the final table does: all records, graded, with that table's number of candidates.
            calibrate: fit the weight of the similarity in the reranking score on these records.
            cached_texts: whether the run's cache of text tokens, if there is one, fits this model's text backbone.
        """
        options = self.options
        rerank = options.final_rerank if final else options.rerank
        started = self.starts_early or not self.fusion_start or step > self.fusion_start
        # Outside autocast: cached tokens are computed in float32, whatever the run's precision.
        tokens, texts = self.caches.tokens(records), self.caches.texts(records) if cached_texts else None
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
                    dims=tuple(model.config.matryoshka_dims or ()) if final else (),
                    calibrate=calibrate,
                    examples=options.gallery_queries if final else 0,
                ),
                tokens=tokens,
                text_tokens=texts,
            )

    def validate(self, progress: Progress, *, keep: bool = True) -> dict[str, float]:
        """Returns the mean R@1 of each score, and saves the best model so far unless `keep` is false.

        Ties, as on a validation set so easy that reranking reaches 100 early, are broken by the dual encoder's score.
        The weight of the similarity in the reranking score is fitted on the validation records as well.
        """
        with self.whole.at_hand() as model:
            return self._validate(model, progress, keep=keep)

    def _validate(self, model: LoopITRModel, progress: Progress, *, keep: bool) -> dict[str, float]:
        check_finite(model, step=progress.step)
        result = self.evaluate(model, self.records, step=progress.step, calibrate=True)
        if result.similarity_weight is not None:
            model.config.similarity_weight = progress.similarity_weight = result.similarity_weight
        scores = result.mean_r1()
        shown = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
        self.accelerator.print(f"step {progress.step}: mean R@1 {shown}")
        score = scores.get(self.selected)  # None: the fusion head may not have started.
        so_far = (-math.inf if best is None else best for best in (progress.best, progress.best_dual))
        if keep and score is not None and (score, scores["dual"]) > tuple(so_far):
            progress.best, progress.best_dual, progress.best_step = score, scores["dual"], progress.step
            if self.accelerator.is_main_process:
                self._save(model)
        return scores

    def _save(self, model: LoopITRModel) -> None:
        """The earlier best model is replaced only once this one is completely written."""

        def write(folder: Path) -> None:
            save_for_use(model, self.caches.processor, folder, keep_mlm_head=self.options.keep_mlm_head)

        write_files(self.folder, write, seen=("README.md",))

    def measure(self, model: LoopITRModel) -> dict[str, float]:
        """The mean R@1 of each score of another model, such as a teacher, on the validation records."""
        return self.evaluate(model, self.records, step=self.fusion_start + 1, cached_texts=False).mean_r1()

    def final(self, records: Sequence[Record], *, step: int) -> RetrievalResult:
        """Evaluate the best model on the records of the final table.

        Its similarity weight is first fitted on all validation records, with as many candidates as the final table
        uses, and stored in the run folder's `config.json`.
        """
        model: Any = LoopITRModel.from_pretrained(self.folder).to(self.accelerator.device)
        if self.uses_pairs and self.options.final_rerank:
            calibration = self.evaluate(model, self.records, step=step, final=True, calibrate=True)
            if calibration.similarity_weight is not None:
                model.config.similarity_weight = calibration.similarity_weight
                if self.accelerator.is_main_process:
                    write_files(self.folder, model.config.save_pretrained)
            if records is self.records:
                return calibration
        elif self.uses_pairs:
            weight = f"the similarity weight stays {model.config.similarity_weight:g}"
            self.accelerator.print(f"validation.final_rerank is 0: there are no candidates to fit on, and {weight}")
        return self.evaluate(model, records, step=step, final=True)


def _fault(folder: Path) -> str | None:
    """What is missing or damaged of the model saved in `folder`, by its files; None: nothing."""
    try:
        read_object(folder / "config.json")
        check_processor_files(folder)
        weights = sorted(folder.glob("model*.safetensors"))
        if not weights:
            return f"{folder} has no model.safetensors"
        for path in weights:
            with safe_open(path, "pt"):  # This compares the size with that in the header.
                pass
    except SafetensorError as error:
        return f"{path}: {error}"
    except (OSError, ValueError) as error:
        return str(error)
    return None

"""The gate of the distillation: it counts only while the teacher is ahead of its student on held-out queries.

A teacher that ranks worse than its student costs points (recipes/results/distillation.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from loopitr.training.checkpoints import Progress

if TYPE_CHECKING:
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.objective.loop_objective import LoopObjective
    from loopitr.objective.teachers import Teacher


class Gate:
    """Compares teacher and student at each validation, and weighs the distillation in between.

    Whether it is open is kept in the run's `Progress`, so that a resumed run goes on alike.
    """

    def __init__(
        self,
        objective: LoopObjective,
        *,
        fusion_start: int,
        warmup: float,
        log: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            fusion_start: the step from which pairs are scored; without a margin distillation counts from there on.
            warmup: steps over which its weight rises from 0, each time that it begins to count.
            log: where it says that it opens or closes.
        """
        self.teacher: Teacher | None = objective.teacher
        self.margin = objective.teacher_margin
        self.fusion_start, self.warmup, self.log = fusion_start, warmup, log

    @property
    def is_used(self) -> bool:
        """Whether there is a teacher that has to be ahead."""
        return self.teacher is not None and self.margin is not None

    def next_scale(self, progress: Progress) -> float:
        """Factor on the weight of the distillation in the step that comes next."""
        since = progress.teaching_since if self.is_used else self.fusion_start
        if since is None:
            return 0.0
        progress.has_taught = True
        return min(1.0, (progress.step + 1 - since) / self.warmup) if self.warmup > 0 else 1.0

    def stage(self, progress: Progress) -> dict[str, Any]:
        """What the objective is called with in the step that comes next, beside the batch."""
        scored = progress.step >= self.fusion_start
        return {"with_pairs": scored, "distillation_scale": self.next_scale(progress)}

    def update(
        self, progress: Progress, scores: dict[str, float], measure: Callable[[LoopITRModel], dict[str, float]]
    ) -> dict[str, float]:
        """Open or close after a validation; returns what is worth logging.

        Args:
            scores: mean R@1 of the student's model by head (`dual`, `match`, `reranked`).
            measure: the same of another model: a teacher's own.
        """
        if self.teacher is None or progress.step < self.fusion_start:
            return {}
        if self.margin is None and progress.watch.get("teacher") is not None:
            return {}  # It has been said.
        own = getattr(self.teacher, "model", None)
        score = self.teacher.held_out_score(scores) if own is None else measure(own).get("match")
        if score is None:
            return {}
        lead = score - scores["dual"]
        if self.margin is None:
            self._say_behind(progress, lead, once=own is not None)
            return {}
        progress.best_lead = lead if progress.best_lead is None else max(lead, progress.best_lead)
        was_open, is_open = progress.teaching_since is not None, lead >= self.margin
        if is_open != was_open:
            progress.teaching_since = progress.step if is_open else None
            change = "distillation counts from here on" if is_open else "distillation no longer counts"
            self.log(
                f"step {progress.step}: the teacher ({self.teacher.name}) is {lead:+.1f} points from the dual head, "
                f"wanted {self.margin:+.1f}: {change}"
            )
        return {"teacher": score}

    def _say_behind(self, progress: Progress, lead: float, *, once: bool) -> None:
        """Without a margin a teacher that is behind teaches all the same; `once`: to ask again costs a validation."""
        assert self.teacher is not None
        if lead >= 0 and not once:
            return
        progress.watch["teacher"] = -1.0
        if lead < 0:
            self.log(
                f"warning: step {progress.step}: the teacher ({self.teacher.name}) is {-lead:.1f} points of R@1 behind "
                "the dual head that learns from it, which costs points: let distillation wait for it "
                "(objective.teacher_margin 1), or choose another objective.teacher"
            )

    def warning(self, progress: Progress) -> str | None:
        """What to say at the end of a run whose distillation never counted; None if it did, or was not asked for."""
        if not self.is_used or progress.has_taught:
            return None
        assert self.teacher is not None
        name = self.teacher.name
        if progress.teaching_since is not None:
            return (
                "warning: distillation never counted: the last validation was the first that found the teacher "
                f"({name}) ahead. Train longer, or validate more often (validation.every_steps)"
            )
        if progress.best_lead is None:
            seen = "no validation before the end compared teacher and student (validation.every_epochs, .rerank)"
        else:
            seen = f"the teacher ({name}) was at most {progress.best_lead:+.1f} points from the dual head"
        return (
            f"warning: distillation never counted: {seen}, wanted {self.margin:+.1f}. Train longer with word "
            "prediction, validate more often, try objective.teacher match_plus_similarity, or set "
            "objective.teacher_margin to null"
        )

"""The gate: distillation is on only while the teacher is ahead of the dual head on held-out queries.

A teacher that ranks worse than its student makes the student worse (recipes/results/distillation.md).
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
    """Compares teacher and student at each validation, and sets the weight of the distillation in between.

    The run's `Progress` has the state of the gate, so that a resumed run continues with it.
    """

    def __init__(
        self,
        objective: LoopObjective,
        *,
        fusion_start: int,
        warmup: float,
        end: int,
        log: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            fusion_start: the step from which pairs are scored; without a margin, distillation is on from there.
            warmup: the number of steps over which the weight rises from 0, each time that distillation is turned on.
            end: the step from which distillation is off for good.
            log: logs when the gate opens or closes.
        """
        self.teacher: Teacher | None = objective.teacher
        self.margin = objective.teacher_margin
        self.fusion_start, self.warmup, self.end, self.log = fusion_start, warmup, end, log

    @property
    def is_used(self) -> bool:
        """Whether there is a teacher, and it has to be ahead by a margin."""
        return self.teacher is not None and self.margin is not None

    def next_scale(self, progress: Progress) -> float:
        """The factor on the weight of the distillation in the next step."""
        since = progress.teaching_since if self.is_used else self.fusion_start
        if since is None or progress.step >= self.end:
            return 0.0
        progress.has_taught = True
        return min(1.0, (progress.step + 1 - since) / self.warmup) if self.warmup > 0 else 1.0

    def stage(self, progress: Progress) -> dict[str, Any]:
        """The arguments of the objective in the next step, besides the batch."""
        with_pairs = progress.step >= self.fusion_start
        return {"with_pairs": with_pairs, "distillation_scale": self.next_scale(progress)}

    def update(
        self, progress: Progress, scores: dict[str, float], measure: Callable[[LoopITRModel], dict[str, float]]
    ) -> dict[str, float]:
        """Open or close the gate after a validation; returns the teacher's score, for the log.

        Args:
            scores: mean R@1 of the model by head (`dual`, `match`, `reranked`).
            measure: computes these scores for a teacher's own model.
        """
        if self.teacher is None or not self.fusion_start <= progress.step < self.end:
            return {}
        if self.margin is None and progress.watch.get("teacher") is not None:
            return {}  # The warning has already been given.
        own = getattr(self.teacher, "model", None)
        score = self.teacher.held_out_score(scores) if own is None else measure(own).get("match")
        if score is None:
            return {}
        lead = score - scores["dual"]
        if self.margin is None:
            self._warn_if_behind(progress, lead, once=own is not None)
            return {}
        progress.best_lead = lead if progress.best_lead is None else max(lead, progress.best_lead)
        was_open, is_open = progress.teaching_since is not None, lead >= self.margin
        if is_open != was_open:
            progress.teaching_since = progress.step if is_open else None
            change = "distillation is on from here" if is_open else "distillation is off"
            self.log(
                f"step {progress.step}: the teacher ({self.teacher.name}) is {lead:+.1f} points from the dual head, "
                f"wanted {self.margin:+.1f}: {change}"
            )
        return {"teacher": score}

    def _warn_if_behind(self, progress: Progress, lead: float, *, once: bool) -> None:
        """Warn once of a teacher that is behind and teaches all the same, since there is no margin.

        `once`: do not compare again, because that costs a validation of the teacher.
        """
        assert self.teacher is not None
        if lead >= 0 and not once:
            return
        progress.watch["teacher"] = -1.0
        if lead < 0:
            self.log(
                f"warning: step {progress.step}: the teacher ({self.teacher.name}) is {-lead:.1f} points of R@1 behind "
                "the dual head that learns from it, which makes the dual head worse: let distillation wait for it "
                "(objective.teacher_margin 1), or choose another objective.teacher"
            )

    def warning(self, progress: Progress) -> str | None:
        """A warning at the end of a run in which distillation was never on; None if it was, or was not asked for."""
        if not self.is_used or progress.has_taught:
            return None
        assert self.teacher is not None
        name = self.teacher.name
        if progress.teaching_since is not None:
            return (
                "warning: distillation was never on: the last validation was the first that found the teacher "
                f"({name}) ahead. Train longer, or validate more often (validation.every_steps)"
            )
        if progress.best_lead is None:
            seen = "no validation before the end compared teacher and student (validation.every_epochs, .rerank)"
        else:
            seen = f"the teacher ({name}) was at most {progress.best_lead:+.1f} points from the dual head"
        return (
            f"warning: distillation was never on: {seen}, wanted {self.margin:+.1f}. Train longer with word "
            "prediction, validate more often, try objective.teacher match_plus_similarity, or set "
            "objective.teacher_margin to null"
        )

"""Warnings about problems of a run that its logged values show, each given once, with advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.losses.distillation import PartialRanking
from loopitr.objective.terms import Distillation, Matching
from loopitr.training.checkpoints import Progress

PATIENCE, LEAST = 500, 20  # The most and the fewest steps that a problem lasts before the warning; between: a quarter.
COLLAPSED = 0.95  # the mean cosine between different images, or texts, of a batch above which embeds have collapsed
NEAR = 0.01  # the relative distance from the loss of a guess below which a head is taken to guess
WARNED = -1.0  # marks a problem in `Progress.watch` for which the warning has been given


def prior_loss(term: Matching, num_negatives: int) -> float:
    """The matching loss of a head that always predicts the share of matching pairs.

    Example:
        >>> from loopitr import Matching
        >>> from loopitr.training.watch import prior_loss
        >>> round(prior_loss(Matching(balanced=False), 1), 3)  # one positive and two negatives
        0.637
    """
    if term.balanced:
        return math.log(2)
    share = 1 / (1 + 2 * term.trained_negatives(num_negatives))  # Both directions share the positive pair.
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


class Watch:
    """Checks every logged line, and warns of a problem that lasts for `patience` steps.

    `Progress.watch` has its memory: by problem the number of steps that it has lasted, or `WARNED`.
    """

    def __init__(self, objective: LoopObjective, *, total_steps: int, log: Callable[[str], None] = print) -> None:
        self.log = log
        self.patience = max(LEAST, min(PATIENCE, total_steps // 4))
        self.prior: float | None = None
        self.too_short: float | None = None
        for term in objective.terms:
            if isinstance(term, Matching) and objective.sum_dropout is None:
                self.prior = prior_loss(term, objective.miner.num_negatives)
            if isinstance(term, Distillation):
                # A list with only the positive has nothing to distil; a partial ranking leaves out the positive.
                self.too_short = 0.0 if isinstance(term.loss, PartialRanking) else 1.0
        dual = objective.model.dual
        self.coldest = 1 / dual.config.max_logit_scale if dual.logit_scale.requires_grad else 0.0

    def look(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Check the values logged at `progress.step`, which are the same on all ranks."""
        memory = progress.watch
        steps = progress.step - memory.get("step", 0)
        problems = self._problems(values)
        if "temperature" in problems and "step" not in memory:
            memory["temperature"] = WARNED  # The model started with this temperature, as CLIP does.
        memory["step"] = progress.step
        for name in {*memory, *problems} - {"step"}:
            if memory.get(name) == WARNED:
                continue
            lasted = memory.get(name, 0) + steps if name in problems else 0
            if lasted >= self.patience:
                self.log(f"warning: step {progress.step}: {problems[name]}")
            memory[name] = WARNED if lasted >= self.patience else lasted

    def _problems(self, values: Mapping[str, float]) -> dict[str, str]:
        """The problems that the values show, with their warnings."""
        problems, long = {}, f"for {self.patience} steps or more"
        itm = values.get("loss/itm", math.inf)
        if self.prior is not None and abs(itm - self.prior) < NEAR * self.prior:
            problems["itm"] = (
                f"the matching loss has been {itm:.3f} {long}, that of guessing: the fusion head has not learned to "
                "look at the image. Train it with word prediction (objective.mlm 1), for longer, with fewer or easier "
                "negatives (objective.mining stratified), or on better tokens (train.fusion_start)"
            )
        temperature = values.get("train/temperature", math.inf)
        if temperature <= self.coldest * (1 + 1e-4):
            problems["temperature"] = (
                f"the temperature has been at its lower limit, {self.coldest:g}, {long}: the similarities cannot grow "
                "sharper. Lower train.lr, or look for captions that many images share"
            )
        for side, other in (("image", "text"), ("text", "image")):
            similarity = values.get(f"train/{side}_similarity", 0.0)
            if similarity > COLLAPSED:
                problems[side] = (
                    f"{side} embeds have been nearly the same (mean cosine {similarity:.3f}) {long}: the dual head "
                    f"cannot tell one {side} from another. Lower train.lr, raise train.warmup or train.batch_size, or "
                    f"check that the {other}s differ"
                )
        length = values.get("train/valid_length", math.inf)
        if self.too_short is not None and length <= self.too_short:
            problems["distillation"] = (
                f"there has been nothing to distil {long}: no candidate is ranked. Choose another objective.hard_rule "
                "(mean or top), more objective.num_negatives, or a larger train.batch_size"
            )
        return problems

"""What a run notices of itself, from the means that it logs anyway: each is said once, with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.losses.distillation import PartialRanking
from loopitr.objective.terms import Distillation, Matching
from loopitr.training.checkpoints import Progress

PATIENCE, LEAST = 500, 20  # steps; a run of few steps is told after a quarter of them
COLLAPSED = 0.95  # mean cosine between different images, or texts, of a batch
NEAR = 0.01  # of the loss of a guess, relative
TOLD = -1.0


def prior_loss(term: Matching, num_negatives: int) -> float:
    """The matching loss of a head that looks at nothing and knows how many pairs match.

    Example:
        >>> from loopitr import Matching
        >>> from loopitr.training.watch import prior_loss
        >>> round(prior_loss(Matching(balanced=False), 1), 3)  # one positive to two negatives
        0.637
    """
    if term.balanced:
        return math.log(2)
    share = 1 / (1 + 2 * term.trained_negatives(num_negatives))  # A positive is one pair of both directions.
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


class Watch:
    """Looks at every logged line; what holds for `patience` steps on end is said. Its memory is `Progress.watch`."""

    def __init__(self, objective: LoopObjective, *, total_steps: int, log: Callable[[str], None] = print) -> None:
        self.log = log
        self.patience = max(LEAST, min(PATIENCE, total_steps // 4))
        self.prior: float | None = None
        self.too_short: float | None = None
        for term in objective.terms:
            if isinstance(term, Matching) and objective.sum_dropout is None:
                self.prior = prior_loss(term, objective.miner.num_negatives)
            if isinstance(term, Distillation):
                self.too_short = 0.0 if isinstance(term.loss, PartialRanking) else 1.0  # the positive alone
        dual = objective.model.dual
        self.coldest = 1 / dual.config.max_logit_scale if dual.logit_scale.requires_grad else 0.0

    def look(self, progress: Progress, values: Mapping[str, float]) -> None:
        """`values`: what is logged at `progress.step`; the same on all ranks."""
        memory = progress.watch
        steps = progress.step - memory.get("step", 0)
        found = self._found(values)
        if "temperature" in found and "step" not in memory:
            memory["temperature"] = TOLD  # It came like that, as CLIP's does.
        memory["step"] = progress.step
        for name in {*memory, *found} - {"step"}:
            if memory.get(name) == TOLD:
                continue
            held = memory.get(name, 0) + steps if name in found else 0
            if held >= self.patience:
                self.log(f"warning: step {progress.step}: {found[name]}")
            memory[name] = TOLD if held >= self.patience else held

    def _found(self, values: Mapping[str, float]) -> dict[str, str]:
        found, long = {}, f"for {self.patience} steps or more"
        itm = values.get("loss/itm", math.inf)
        if self.prior is not None and abs(itm - self.prior) < NEAR * self.prior:
            found["itm"] = (
                f"the matching loss has been {itm:.3f} {long}, what a guess gives: the fusion head has not learned to "
                "look at the image. Train it with word prediction (objective.mlm 1), for longer, with fewer or easier "
                "negatives (objective.mining stratified), or on better tokens (train.fusion_start)"
            )
        temperature = values.get("train/temperature", math.inf)
        if temperature <= self.coldest * (1 + 1e-4):
            found["temperature"] = (
                f"the temperature has been at its lower limit, {self.coldest:g}, {long}: the similarities cannot grow "
                "sharper. Lower train.lr, or look for captions that many images share"
            )
        for side, other in (("image", "text"), ("text", "image")):
            similarity = values.get(f"train/{side}_similarity", 0.0)
            if similarity > COLLAPSED:
                found[side] = (
                    f"{side} embeds have been nearly the same (mean cosine {similarity:.3f}) {long}: the dual head "
                    f"cannot tell one {side} from another. Lower train.lr, raise train.warmup or train.batch_size, or "
                    f"see whether the {other}s differ"
                )
        length = values.get("train/valid_length", math.inf)
        if self.too_short is not None and length <= self.too_short:
            found["distillation"] = (
                f"there has been nothing to distil {long}: no candidate counts. Choose another objective.hard_rule "
                "(mean or top), more objective.num_negatives, or a larger train.batch_size"
            )
        return found

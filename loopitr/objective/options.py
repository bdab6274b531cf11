"""The step's options, and the miners and distillation losses that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from loopitr.objective import losses
from loopitr.objective.mining import Mined, mine_sample, mine_stratified, mine_topk


@dataclass
class ObjectiveOptions:
    """Weights and choices of the step. A term of weight 0 is not computed."""

    itc: float = 1.0
    """Weight of the contrastive loss of the dual head."""
    itc_loss: Literal["softmax", "sigmoid"] = "softmax"
    """InfoNCE over a query's candidates (CLIP), or each pair by itself (SigLIP; needs a model with a logit_bias)."""
    itm: float = 1.0
    """Weight of the matching loss of the fusion head."""
    balance_itm: bool = True
    """Positives and negatives weigh one half each in the matching loss; otherwise every pair weighs the same."""
    lce: float = 0.0
    """Weight of ranking each positive above its own negatives by match score (localized contrastive estimation)."""
    distillation: float = 1.0
    """Weight of the distillation of the fusion head's scores into the dual head."""
    mlm: float = 0.0
    """Weight of masked language modelling on the fused tokens (needs a model with an mlm_head)."""
    mlm_probability: float = 0.15
    """Part of a caption's tokens that `mlm` masks. BERT's is 0.15; a fusion head from scratch learns faster from 0.3."""
    num_negatives: int = 4
    """K, hard negatives per image and per text."""
    itm_negatives: int | None = None
    """Train the matching losses on only so many of them, the first mined; the scores of the others are computed
    without gradient and only teach. Unset: on all."""
    mining: Literal["topk", "sample", "stratified"] = "topk"
    """How they are chosen from the dual's similarities."""
    mining_pool: int = 32
    """`stratified`: how deep in the ranking to look. A new fusion head starts slowly on near misses alone: let it see
    the whole batch."""
    mine_across_ranks: bool = False
    """Mine in the batch of all ranks (tokens are gathered) instead of the local one."""
    distillation_loss: Literal["kl", "cprd", "margin_mse", "ranknet", "listnet", "listmle", "adr_mse"] = "cprd"
    """What the teacher's scores teach: their softmax (kl), the partial ranking of the negatives (cprd), ..."""
    teacher_temperature: float = 1.0
    """`kl`: temperature of the teacher's softmax."""
    hard_rule: Literal["threshold", "mean", "top"] = "mean"
    """`cprd`: which negatives count as hard: match probability above a constant, above the mean, the first m."""
    hard_threshold: float = 0.5
    """`hard_rule: threshold`: the match probability."""
    hard_top: int = 2
    """`hard_rule: top`: m."""

    def __post_init__(self) -> None:
        for name in ("itc", "itm", "lce", "distillation", "mlm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name} must be a weight >= 0, got {getattr(self, name)}")
        for name in ("num_negatives", "mining_pool", "hard_top"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"objective.mlm_probability must be between 0 and 1, got {self.mlm_probability}")
        if not 0 < self.hard_threshold < 1:
            raise ValueError(f"objective.hard_threshold must be between 0 and 1, got {self.hard_threshold}")
        if not self.teacher_temperature > 0:
            raise ValueError(f"objective.teacher_temperature must be above 0, got {self.teacher_temperature}")
        if self.itm_negatives is not None and not 1 <= self.itm_negatives <= self.num_negatives:
            limits = f"from 1 to num_negatives {self.num_negatives}"
            raise ValueError(f"objective.itm_negatives must be {limits}, got {self.itm_negatives}")
        for name, known in NAMED.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")

    @property
    def trains_scores(self) -> bool:
        """Whether match scores have a loss of their own, not only teach."""
        return self.itm > 0 or self.lce > 0

    @property
    def trained_candidates(self) -> int:
        """How many of a query's 1 + K candidates, the positive first, the fusion head learns from."""
        return 1 + (self.itm_negatives or self.num_negatives)

    @property
    def teaches_alone(self) -> bool:
        """Whether the scores of the other candidates only teach."""
        return self.trained_candidates < 1 + self.num_negatives

    @property
    def scores_pairs(self) -> bool:
        return self.trains_scores or self.distillation > 0


@dataclass(frozen=True)
class Taught:
    """A distillation loss and the mean number of candidates per query that it ranked."""

    loss: Tensor
    valid_length: Tensor


Distil = Callable[[Tensor, Tensor, Tensor, ObjectiveOptions], Taught]  # student, teacher, valid [Q, 1 + K]


def _kl(student: Tensor, teacher: Tensor, valid: Tensor, options: ObjectiveOptions) -> Taught:
    loss = losses.kl(student, teacher, valid, teacher_temperature=options.teacher_temperature)
    return Taught(loss, _mean_length(valid))


def _cprd(student: Tensor, teacher: Tensor, valid: Tensor, options: ObjectiveOptions) -> Taught:
    student, teacher, valid = student[:, 1:], teacher[:, 1:], valid[:, 1:]  # a ranking of the negatives alone
    hard = HARD_RULES[options.hard_rule](teacher, valid, options)
    return Taught(losses.cprd(student, teacher, valid, hard), _mean_length(hard))


def _whole_list(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Distil:
    """A loss on all candidates, the positive included."""

    def distil(student: Tensor, teacher: Tensor, valid: Tensor, options: ObjectiveOptions) -> Taught:
        return Taught(loss(student, teacher, valid), _mean_length(valid))

    return distil


def _mean_length(mask: Tensor) -> Tensor:
    return mask.sum(1).float().mean()


DISTILLATION: dict[str, Distil] = {
    "kl": _kl,
    "cprd": _cprd,
    "margin_mse": _whole_list(losses.margin_mse),
    "ranknet": _whole_list(losses.ranknet),
    "listnet": _whole_list(losses.listnet),
    "listmle": _whole_list(losses.listmle),
    "adr_mse": _whole_list(losses.adr_mse),
}

HARD_RULES: dict[str, Callable[[Tensor, Tensor, ObjectiveOptions], Tensor]] = {
    "threshold": lambda t, valid, o: losses.hard_above_threshold(t, valid, probability=o.hard_threshold),
    "mean": lambda t, valid, o: losses.hard_above_mean(t, valid),
    "top": lambda t, valid, o: losses.hard_top(t, valid, o.hard_top),
}

MINING: dict[str, Callable[[Tensor, Tensor, Tensor, ObjectiveOptions], Mined]] = {
    "topk": lambda s, positives, groups, o: mine_topk(s, positives, o.num_negatives, groups=groups),
    "sample": lambda s, positives, groups, o: mine_sample(s, positives, o.num_negatives, groups=groups),
    "stratified": lambda s, positives, groups, o: mine_stratified(
        s, positives, o.num_negatives, pool=max(o.mining_pool, o.num_negatives), groups=groups
    ),
}

NAMED: dict[str, Iterable[str]] = {
    "itc_loss": ("softmax", "sigmoid"),
    "mining": MINING,
    "distillation_loss": DISTILLATION,
    "hard_rule": HARD_RULES,
}

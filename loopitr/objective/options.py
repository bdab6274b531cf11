"""The step's options; `build.py` makes the objects that they name. Light: it imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from loopitr.checks import check_at_least, check_known

ContrastiveName = Literal["softmax", "sigmoid"]
MiningName = Literal["topk", "sample", "stratified"]
DistillationName = Literal["kl", "cprd", "margin_mse", "ranknet", "listnet", "listmle", "adr_mse"]
WordChoice = Literal["all", "content"]
TeacherName = Literal["match", "match_plus_similarity", "momentum", "frozen"]
HardRuleName = Literal["threshold", "mean", "top"]


@dataclass
class ObjectiveOptions:
    """Weights and choices of the step. A term of weight 0 is not computed.

    What the defaults rest on: `mlm`, `mlm_probability`, `num_negatives`, `train_on_sum`, `agreement`, `distillation`,
    `distillation_loss`, `hard_rule` and `teacher_margin` have rows in recipes/results/distillation.md; `mining_pool`,
    `balance_itm` and `lce` in recipes/results/scenes.md. The rest is as published, not studied here.
    """

    itc: float = 1.0
    """Weight of the contrastive loss of the dual head."""
    itc_loss: ContrastiveName = "softmax"
    """InfoNCE over a query's candidates (CLIP), or each pair by itself (SigLIP; needs a model with a logit_bias)."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Train the contrastive loss at the first so many dimensions of the embeds too, as [64, 128]: vectors may then be
    cut to these (`truncate_dim`). The loss is the mean over them and the whole width (arXiv 2205.13147)."""
    itm: float = 1.0
    """Weight of the matching loss of the fusion head."""
    train_on_sum: bool = False
    """Train the fusion head on match score + similarity / temperature: it learns the correction that the dual needs."""
    sum_dropout: float = 0.3
    """`train_on_sum`: share of the queries for which the similarity is left out."""
    balance_itm: bool = True
    """Positives and negatives weigh one half each in the matching loss; otherwise every pair weighs the same."""
    lce: float = 0.0
    """Weight of ranking each positive above its own negatives by match score (localized contrastive estimation)."""
    distillation: float | None = None
    """Weight of the distillation of the fusion head's scores into the dual head. Unset: 1, but 0 in a run whose fusion
    head starts from scratch and would teach by its own match scores, since a young teacher costs points."""
    cmd: float = 0.0
    """Weight of the similarities within one modality teaching those within the other (arXiv 2405.03355)."""
    cmc: float = 0.0
    """Weight of the contrast with the embeds of one modality, which get no gradient from it (arXiv 2405.03355)."""
    structure_source: Literal["image", "text"] = "image"
    """`cmd`, `cmc`: the modality that teaches the other."""
    mlm: float | None = None
    """Weight of masked language modelling on the fused tokens, which teaches a new fusion head which word belongs to
    which region. Unset: 1 in a run whose fusion head starts from scratch, otherwise 0."""
    mlm_probability: float = 0.3
    """Part of a caption's tokens that `mlm` masks, at least one of each caption. BERT has 0.15; a fusion head from
    scratch learns faster from 0.3."""
    mlm_words: WordChoice = "all"
    """Which tokens `mlm` may mask: all, or those of content alone, which few captions share (`mlm_common`)."""
    mlm_common: float = 0.1
    """`mlm_words: content`: tokens that stand in at least this part of the training captions are never masked."""
    agreement: float | None = None
    """Weight of InfoNCE on the token agreement of all pairs of the batch (needs a model with fusion.agreement). Unset:
    1 in a run whose model has it and starts from scratch, otherwise 0."""
    num_negatives: int = 4
    """K, hard negatives per image and per text."""
    itm_negatives: int | None = None
    """Train the matching losses on only so many of them, the first mined; the scores of the others are computed
    without gradient and only teach. Unset: on all."""
    mining: MiningName = "topk"
    """How they are chosen from the dual's similarities."""
    mining_pool: int = 32
    """`stratified`: how deep in the ranking to look. A new fusion head starts slowly on near misses alone: let it see
    the whole batch."""
    mine_across_ranks: bool = False
    """Mine in the batch of all ranks (tokens are gathered) instead of the local one."""
    distillation_loss: DistillationName = "cprd"
    """What the teacher's scores teach: their softmax (kl), the partial ranking of the negatives (cprd), ..."""
    teacher: TeacherName = "match"
    """Whose scores: the match scores, the reranking scores (match_plus_similarity), the match scores of an exponential
    moving average of the model (momentum), or of another model (frozen, `teacher_model`)."""
    teacher_model: str | None = None
    """`teacher: frozen`: a model folder or hub id, of the same image size and vocabulary."""
    momentum: float = 0.995
    """`teacher: momentum`: how much of the average stays at each step."""
    teacher_margin: float | None = 1.0
    """The gate: distillation counts only while the last validation found the teacher ahead of the dual head by so many
    points of mean R@1. null: it always counts."""
    teacher_temperature: float = 1.0
    """`kl`: temperature of the teacher's softmax."""
    hard_rule: HardRuleName = "mean"
    """`cprd`: which negatives count as hard: match probability above a constant, above the mean, the first m."""
    hard_threshold: float = 0.5
    """`hard_rule: threshold`: the match probability."""
    hard_top: int = 2
    """`hard_rule: top`: m."""

    def __post_init__(self) -> None:
        check_at_least(
            0,
            "objective",
            wanted="a weight >= 0",
            itc=self.itc,
            itm=self.itm,
            lce=self.lce,
            distillation=self.distillation,
            cmd=self.cmd,
            cmc=self.cmc,
            mlm=self.mlm,
            agreement=self.agreement,
        )
        check_at_least(
            1, "objective", num_negatives=self.num_negatives, mining_pool=self.mining_pool, hard_top=self.hard_top
        )
        for dim in self.matryoshka_dims:
            if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
                raise ValueError(f"objective.matryoshka_dims must be whole numbers of at least 1, got {dim!r}")
        if len({*self.matryoshka_dims}) < len(self.matryoshka_dims):
            raise ValueError(f"objective.matryoshka_dims must differ, got {self.matryoshka_dims}")
        if self.matryoshka_dims and not self.itc:
            raise ValueError(f"objective.matryoshka_dims {self.matryoshka_dims} needs objective.itc above 0")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"objective.mlm_probability must be between 0 and 1, got {self.mlm_probability}")
        if not 0 <= self.sum_dropout <= 1:
            raise ValueError(f"objective.sum_dropout must be from 0 to 1, got {self.sum_dropout}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"objective.momentum must be from 0 to below 1, got {self.momentum}")
        if self.teacher_margin is not None and not -100 <= self.teacher_margin <= 100:
            raise ValueError(f"objective.teacher_margin must be points of R@1, or null, got {self.teacher_margin}")
        if (self.teacher == "frozen") != (self.teacher_model is not None):
            raise ValueError(
                "objective.teacher 'frozen' and objective.teacher_model go together, "
                f"got {self.teacher!r} and {self.teacher_model}"
            )
        if not 0 < self.mlm_common <= 1:
            raise ValueError(f"objective.mlm_common must be above 0 and at most 1, got {self.mlm_common}")
        if not 0 < self.hard_threshold < 1:
            raise ValueError(f"objective.hard_threshold must be between 0 and 1, got {self.hard_threshold}")
        if not self.teacher_temperature > 0:
            raise ValueError(f"objective.teacher_temperature must be above 0, got {self.teacher_temperature}")
        if self.itm_negatives is not None and not 1 <= self.itm_negatives <= self.num_negatives:
            limits = f"from 1 to num_negatives {self.num_negatives}"
            raise ValueError(f"objective.itm_negatives must be {limits}, got {self.itm_negatives}")
        check_known(get_args(ContrastiveName), itc_loss=self.itc_loss)
        check_known(get_args(MiningName), mining=self.mining)
        check_known(get_args(DistillationName), distillation_loss=self.distillation_loss)
        check_known(get_args(HardRuleName), hard_rule=self.hard_rule)
        check_known(get_args(TeacherName), teacher=self.teacher)
        check_known(get_args(WordChoice), mlm_words=self.mlm_words)

    @property
    def distillation_weight(self) -> float:
        """`distillation`; unset: 1."""
        return 1.0 if self.distillation is None else self.distillation

    @property
    def scores_pairs(self) -> bool:
        """Whether a term asks for match scores, or trains a part of them."""
        return self.itm > 0 or self.lce > 0 or self.distillation_weight > 0 or bool(self.agreement)

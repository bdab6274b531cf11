"""The options of the training step; `build.py` makes the objects that they name. This module imports nothing heavy."""

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

    recipes/results/distillation.md has the measurements behind the defaults of `mlm`, `mlm_probability`,
    `num_negatives`, `train_on_sum`, `agreement`, `distillation`, `distillation_loss`, `hard_rule` and `teacher_margin`;
    recipes/results/scenes.md those behind `mining_pool`, `balance_itm` and `lce`. The other defaults are as published.
    """

    itc: float = 1.0
    """Weight of the contrastive loss of the dual head."""
    itc_loss: ContrastiveName = "softmax"
    """InfoNCE over the texts or images of the batch (CLIP), or a sigmoid loss per pair (SigLIP; needs a model with a
    logit_bias)."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Prefixes of the embeds that the contrastive loss trains too, as [64, 128]; vectors can then be cut to these
    lengths (`truncate_dim`). The loss is the mean over them and the whole width (arXiv 2205.13147)."""
    itm: float = 1.0
    """Weight of the matching loss of the fusion head."""
    train_on_sum: bool = False
    """Train the fusion head on match score + similarity / temperature, so that it learns to correct the dual head."""
    sum_dropout: float = 0.3
    """`train_on_sum`: the share of queries for which the similarity is left out."""
    balance_itm: bool = True
    """Give positives and negatives half of the matching loss each; otherwise every pair weighs the same."""
    lce: float = 0.0
    """Weight of localized contrastive estimation, which ranks each positive above its own negatives by match score."""
    distillation: float | None = None
    """Weight of the distillation of the teacher's scores into the dual head. Unset: 1, but 0 in a run whose fusion head
    starts from scratch and teaches with its own match scores, since an untrained teacher lowers the recall."""
    distillation_trains: Literal["all", "projections"] = "all"
    """What the distillation trains: the whole dual encoder, or only the projections on top of its backbones. A young
    teacher that stands on the same backbones needs `projections` (recipes/results/distillation.md)."""
    cmd: float = 0.0
    """Weight of CMD: similarities within one modality learn from those within the other (arXiv 2405.03355)."""
    cmc: float = 0.0
    """Weight of CMC: InfoNCE against the embeds of one modality, which get no gradient (arXiv 2405.03355)."""
    structure_source: Literal["image", "text"] = "image"
    """`cmd`, `cmc`: the modality that the other learns from."""
    mlm: float | None = None
    """Weight of masked language modelling on the fused tokens, which teaches a new fusion head which word belongs to
    which region. Unset: 1 in a run whose fusion head starts from scratch, otherwise 0."""
    mlm_probability: float = 0.3
    """Probability that `mlm` masks a token; at least one token of each caption is masked. BERT has 0.15, but a fusion
    head from scratch learns faster with 0.3."""
    mlm_words: WordChoice = "all"
    """The tokens that `mlm` may mask: all, or only content words, those that few captions contain (`mlm_common`)."""
    mlm_common: float = 0.1
    """`mlm_words: content`: tokens in at least this share of the training captions are not masked, except in a caption
    that has no other words."""
    agreement: float | None = None
    """Weight of InfoNCE on the token agreement of all pairs of the batch; needs a model with fusion.agreement. Unset:
    1 in a run whose model has it and starts from scratch, otherwise 0."""
    num_negatives: int = 4
    """K, the number of hard negatives per image and per text."""
    itm_negatives: int | None = None
    """Number of these that the matching losses train on, the first that were mined; the scores of the others are
    computed without gradient and only teach. Unset: all."""
    mining: MiningName = "topk"
    """How hard negatives are chosen: the most similar (topk), drawn by similarity (sample), or spread over the first
    `mining_pool` of the ranking (stratified)."""
    mining_pool: int = 32
    """`stratified`: how many of the most similar negatives to choose from. A new fusion head learns slowly from near
    misses alone; for it, use the whole batch."""
    mine_across_ranks: bool = False
    """Mine in the batch of all ranks, whose tokens are then gathered, instead of this rank's batch."""
    distillation_loss: DistillationName = "cprd"
    """The loss between the teacher's scores and the dual head's: the KL divergence of their softmax (kl), the partial
    ranking of the negatives (cprd), or another of `losses/distillation.py`."""
    teacher: TeacherName = "match"
    """The source of the teacher's scores: the match scores, the reranking scores (match_plus_similarity), or the match
    scores of an exponential moving average of the model (momentum) or of another model (frozen, `teacher_model`)."""
    teacher_model: str | None = None
    """`teacher: frozen`: a model folder or hub id, of the same image size and vocabulary. Pixels are converted to its
    own mean and standard deviation."""
    momentum: float = 0.995
    """`teacher: momentum`: the decay of the moving average."""
    teacher_margin: float | None = 1.0
    """The gate: distillation is on only while the teacher was ahead of the dual head in the last validation, by this
    many points of mean R@1. null: it is always on."""
    teacher_temperature: float = 1.0
    """`kl`: temperature of the teacher's softmax."""
    hard_rule: HardRuleName = "mean"
    """`cprd`: the negatives that count as hard: those above a match probability (threshold), those above the query's
    mean score (mean), or the m best (top)."""
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
        """Whether a term asks for match scores or trains a part of them."""
        return self.itm > 0 or self.lce > 0 or self.distillation_weight > 0 or bool(self.agreement)

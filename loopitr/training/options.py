"""The option tree of `recipes/pretrain.py`; the same tree is written into the run folder as `config.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from loopitr.building.options import ModelOptions
from loopitr.checks import check_at_least
from loopitr.data.sources import DataOptions
from loopitr.objective.options import ObjectiveOptions


@dataclass
class TrainOptions:
    """The run.

    Example:
        >>> from loopitr import TrainOptions
        >>> TrainOptions(output_dir="runs/mine", epochs=3, batch_size=32, fusion_start=0.2).schedule
        'cosine'
    """

    output_dir: str = "runs/pretrain"
    """Where the model, metrics, curves and checkpoints go. An older run there is moved aside, never overwritten;
    a folder that holds anything else is refused."""
    epochs: int = 10
    """Passes over the training images (or captions)."""
    max_steps: int | None = None
    """Stop after so many optimiser steps; needed with streaming data, whose length is unknown."""
    batch_size: int = 64
    """Image-caption pairs per process and step; negatives come from this batch."""
    chunk_size: int | None = None
    """Encode so many pairs at a time (GradCache): the gradient of the whole batch in less memory, for one more forward
    pass of the backbones. Unset: all at once."""
    accumulation: int = 1
    """Batches per optimiser step (negatives are not shared between them)."""
    backbone_lr: float = 5e-5
    """Peak learning rate of the two backbones."""
    lora_lr: float | None = None
    """Peak learning rate of LoRA adapters (`model.lora`); unset: ten times `backbone_lr`."""
    lr: float = 5e-4
    """Peak learning rate of the projections, the temperature and the fusion head."""
    weight_decay: float = 0.02
    """AdamW's, on matrices only."""
    warmup: float = 0.1
    """Part of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "warmup_stable_decay"] = "cosine"
    """After the warm-up: a cosine down to `min_lr`, one before `fusion_start` and another from there on; or one
    schedule for the whole run, which stays at the peak until `decay_start` and then falls linearly to `min_lr`."""
    decay_start: float = 0.7
    """`schedule: warmup_stable_decay`: part of the steps after which the learning rate falls."""
    min_lr: float = 0.0
    """Where the learning rate ends, as a part of its peak."""
    clip: float = 1.0
    """Gradient norm is clipped to this."""
    fusion_start: float = 0.0
    """Part of the steps before the fusion head scores pairs. Until then the dual head trains alone (beside word
    prediction, if there is any), with `schedule: cosine` to the end of a schedule of its own. A new fusion head learns
    little from the tokens of backbones that have not learned anything yet."""
    loop_backbone_lr: float | None = None
    """Peak learning rate of the backbones from `fusion_start` on; unset: `backbone_lr`. A tenth of it keeps the tokens
    still that the fusion head learns to read."""
    distillation_warmup: float = 0.1
    """Part of the steps over which the distillation's weight rises from 0, once the fusion head has joined."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Autocast, in training and evaluation; unset: what `accelerate launch` says."""
    compile: bool = False
    """torch.compile the backbones and the fusion encoder; the first steps then take minutes."""
    seed: int = 0
    """Of weights, order, augmentation, dropout."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    checkpoint_every: int = 500
    """Optimiser steps between checkpoints, beside the one at the end of every epoch; 0: only those."""
    checkpoint_minutes: float = 10.0
    """Minutes after which there is one in any case; 0: none by the clock."""
    keep_checkpoints: int = 2
    """Older ones are deleted."""
    max_bad_steps: int = 10
    """A step whose loss or gradient is not finite is left out; so many in a row stop the run. 0: they never do."""
    log_every: int = 10
    """Optimiser steps between log lines."""
    tracker: str = "auto"
    """accelerate tracker: tensorboard, wandb, ...; auto: tensorboard if installed; none."""
    license: str | None = None
    """Licence in the model's card, in the hub's words (apache-2.0, cc-by-nc-4.0, ...). Unset: apache-2.0 of a model of
    the built-in scenes that started from nothing, otherwise unknown."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            "train",
            batch_size=self.batch_size,
            chunk_size=self.chunk_size,
            accumulation=self.accumulation,
            keep_checkpoints=self.keep_checkpoints,
            log_every=self.log_every,
            max_steps=self.max_steps,
        )
        check_at_least(
            0,
            "train",
            epochs=self.epochs,
            backbone_lr=self.backbone_lr,
            loop_backbone_lr=self.loop_backbone_lr,
            lora_lr=self.lora_lr,
            lr=self.lr,
            weight_decay=self.weight_decay,
            checkpoint_every=self.checkpoint_every,
            checkpoint_minutes=self.checkpoint_minutes,
            max_bad_steps=self.max_bad_steps,
        )
        if not 0 <= self.warmup <= 1 or not 0 <= self.distillation_warmup <= 1:
            raise ValueError(
                "train.warmup and train.distillation_warmup are parts of the steps, from 0 to 1, "
                f"got {self.warmup} and {self.distillation_warmup}"
            )
        if not 0 <= self.fusion_start < 1:
            raise ValueError(f"train.fusion_start is a part of the steps, from 0 to below 1, got {self.fusion_start}")
        if self.loop_backbone_lr is not None and not self.fusion_start:
            raise ValueError("train.loop_backbone_lr needs train.fusion_start above 0; otherwise it is backbone_lr")
        if self.schedule == "warmup_stable_decay" and not self.warmup <= self.decay_start <= 1:
            raise ValueError(
                f"train.decay_start is a part of the steps, from train.warmup ({self.warmup}) to 1, "
                f"got {self.decay_start}"
            )
        if not 0 <= self.min_lr <= 1:
            raise ValueError(f"train.min_lr is a part of the peak learning rate, from 0 to 1, got {self.min_lr}")
        if not self.clip > 0:
            raise ValueError(f"train.clip must be above 0, got {self.clip}")


@dataclass
class ValidationOptions:
    """Recall on held-out data; the best model by mean R@1 is the one that is kept."""

    every_epochs: int = 1
    """0: only at the end."""
    every_steps: int = 0
    """Optimiser steps between validations; 0: by epochs."""
    rerank: int = 16
    """Candidates per query for the fusion head; 0: dual only."""
    max_images: int | None = None
    """Validate on the first so many images, for speed."""
    batch_size: int = 64
    """Images encoded at a time."""
    final_split: str | None = None
    """Split of the final table; unset: the validation split (`scenes`: its test split)."""
    final_rerank: int = 32
    """Candidates per query in the final table."""
    gallery_queries: int = 16
    """Queries of each direction on the page beside it, gallery.html, with small copies of the images; 0: no page."""
    select: Literal["auto", "dual", "match", "match_plus_similarity", "reranked"] = "auto"
    """Whose mean R@1 chooses the best model; auto: reranked (by match score and the fitted weight of the similarity)
    where pairs are scored, else dual."""
    keep_mlm_head: bool = False
    """Keep the masked-language-model head in the model that is saved for use; checkpoints always have it."""

    def __post_init__(self) -> None:
        check_at_least(
            0,
            "validation",
            every_epochs=self.every_epochs,
            every_steps=self.every_steps,
            rerank=self.rerank,
            final_rerank=self.final_rerank,
            gallery_queries=self.gallery_queries,
        )
        check_at_least(1, "validation", batch_size=self.batch_size, max_images=self.max_images)
        if self.rerank == 0 and self.select not in ("auto", "dual"):
            raise ValueError(f"validation.select {self.select!r} needs validation.rerank above 0")


@dataclass
class RunOptions:
    """The options of a trainer that was made of objects, without a whole tree of them."""

    train: TrainOptions
    data: DataOptions
    validation: ValidationOptions


@dataclass
class PretrainOptions:
    """Everything a run is made of."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    resume: bool = False
    """Continue from the newest checkpoint in train.output_dir; a finished run there is left as it is. The options must
    be those that the run was begun with, but for where things go and how often something is said or kept."""
    resume_with_changes: bool = False
    """Continue although options that change the run (data, batch, seed, schedule, model) are others now."""

    def decided(self) -> PretrainOptions:
        """A copy in which `objective.mlm` and `objective.agreement` are numbers, and `model.mlm_head` is there where
        words are predicted.

        A fusion head that starts from scratch learns grounding from word prediction and from token agreement
        (recipes/results/distillation.md).
        """
        starts = self.model.init is None and self.objective.scores_pairs and "fusion" not in self.model.freeze
        mlm, agreement = self.objective.mlm, self.objective.agreement
        if mlm is None:
            mlm = 1.0 if starts else 0.0
        if agreement is None:
            agreement = 1.0 if starts and self.model.fusion.agreement else 0.0
        model = replace(self.model, mlm_head=self.model.mlm_head or mlm > 0)
        return replace(self, model=model, objective=replace(self.objective, mlm=mlm, agreement=agreement))

    def __post_init__(self) -> None:
        weights = ("itc", "itm", "lce", "distillation", "cmd", "cmc", "mlm", "agreement")
        if not any(getattr(self.objective, name) for name in weights):
            raise ValueError(
                f"nothing would be trained: {', '.join(f'objective.{name}' for name in weights)} are all 0"
            )
        if not self.objective.scores_pairs and self.validation.select not in ("auto", "dual"):
            raise ValueError(f"validation.select {self.validation.select!r} needs objective.itm, .lce or .distillation")

"""The options of `recipes/pretrain.py`, which the run folder has as `config.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from loopitr.building.options import ModelOptions
from loopitr.checks import check_at_least
from loopitr.data.options import DataOptions
from loopitr.objective.options import ObjectiveOptions


@dataclass
class TrainOptions:
    """The options of a training run.

    Example:
        >>> from loopitr import TrainOptions
        >>> TrainOptions(output_dir="runs/mine", epochs=3, batch_size=32, fusion_start=0.2).schedule
        'cosine'
    """

    output_dir: str = "runs/pretrain"
    """Folder for the model, metrics, curves and checkpoints. An earlier run there is renamed, never overwritten; a
    folder that holds anything else is refused."""
    epochs: int = 10
    """Passes over the training images (or captions)."""
    max_steps: int | None = None
    """Number of optimiser steps, instead of `epochs`; needed with streaming data, whose length is unknown."""
    batch_size: int = 64
    """Image-caption pairs per process and step; negatives come from this batch."""
    chunk_size: int | None = None
    """Number of pairs encoded at a time (GradCache): the gradient of the whole batch in less memory, for one more
    forward pass of the backbones. Unset: all at once."""
    accumulation: int = 1
    """Batches per optimiser step; negatives are not shared between them."""
    backbone_lr: float = 5e-5
    """Peak learning rate of the two backbones."""
    lora_lr: float | None = None
    """Peak learning rate of LoRA adapters (`model.lora`); unset: ten times `backbone_lr`."""
    lr: float = 5e-4
    """Peak learning rate of the projections, the temperature and the fusion head."""
    weight_decay: float = 0.02
    """Weight decay of AdamW, only on matrices."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "warmup_stable_decay"] = "cosine"
    """After the warm-up: a cosine down to `min_lr`, with one cycle before `fusion_start` and another after it (cosine);
    or one schedule for the whole run, at the peak until `decay_start`, then falling linearly to `min_lr`."""
    decay_start: float = 0.7
    """`schedule: warmup_stable_decay`: fraction of the steps after which the learning rate falls."""
    min_lr: float = 0.0
    """Learning rate at the end, as a fraction of its peak."""
    clip: float = 1.0
    """Maximum norm of the gradient; larger ones are scaled down."""
    fusion_start: float = 0.0
    """Fraction of the steps before the fusion head scores pairs. Until then the dual head trains alone (with word
    prediction, if used). A new fusion head learns little from the tokens of untrained backbones."""
    loop_backbone_lr: float | None = None
    """Peak learning rate of the backbones from `fusion_start` on; unset: `backbone_lr`. With a tenth of it, the tokens
    that the fusion head learns to read change little."""
    distillation_warmup: float = 0.1
    """Fraction of the steps over which the weight of the distillation rises from 0, each time it is turned on."""
    distillation_end: float = 1.0
    """Fraction of the steps after which distillation is off. What a falling learning rate finds, the teacher does not
    know yet: end where the rate begins to fall, at `decay_start` (recipes/results/distillation.md)."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Autocast in training and evaluation; unset: as `accelerate launch` says."""
    compile: bool = False
    """torch.compile the backbones and the fusion encoder; the first steps then take minutes."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    checkpoint_every: int = 500
    """Optimiser steps between checkpoints, besides the one at the end of every epoch; 0: only those."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, if no other was due; 0: no limit."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep; older ones are deleted."""
    max_bad_steps: int = 10
    """A step whose loss or gradient is not finite is skipped; this many in a row, or half of all steps, stop the run.
    0: never stop."""
    log_every: int = 10
    """Optimiser steps between log lines."""
    tracker: str = "auto"
    """accelerate tracker: tensorboard, wandb, ...; auto: tensorboard if installed; none."""
    license: str | None = None
    """Licence in the model card, by its hub name (apache-2.0, cc-by-nc-4.0, ...). Unset: apache-2.0 for a model trained
    from scratch on the built-in scenes, otherwise unknown."""

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
        if not self.fusion_start < self.distillation_end <= 1:
            raise ValueError(
                f"train.distillation_end is a part of the steps, from above train.fusion_start ({self.fusion_start}) "
                f"to 1, got {self.distillation_end}"
            )
        if self.loop_backbone_lr is not None and not self.fusion_start:
            raise ValueError("train.loop_backbone_lr needs train.fusion_start above 0; otherwise it is backbone_lr")
        if self.loop_backbone_lr and not self.backbone_lr:
            raise ValueError("train.loop_backbone_lr needs train.backbone_lr above 0, of which it is a multiple")
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
    """Evaluation on held-out data, which chooses the best model by mean R@1."""

    every_epochs: int = 1
    """Epochs between validations; 0: only at the end."""
    every_steps: int = 0
    """Optimiser steps between validations, in addition to those by epochs; 0: none."""
    rerank: int = 16
    """Candidates per query for the fusion head; 0: evaluate the dual head alone."""
    max_images: int | None = None
    """Number of images to validate on, the first ones; unset: all."""
    batch_size: int = 64
    """Images encoded at a time."""
    final_split: str | None = None
    """Split of the final table; unset: the validation split (`scenes`: its test split)."""
    final_rerank: int = 32
    """Candidates per query in the final table."""
    gallery_queries: int = 16
    """Queries of each direction on the page gallery.html, with small copies of the images; 0: no page."""
    select: Literal["auto", "dual", "match", "match_plus_similarity", "reranked"] = "auto"
    """The score whose mean R@1 chooses the best model; auto: reranked if pairs are scored, else dual."""
    keep_mlm_head: bool = False
    """Keep the masked-language-model head in the saved model; checkpoints always have it."""

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
    """The options of a `Trainer` that was made from objects; they are its `config.yaml`."""

    train: TrainOptions
    data: DataOptions
    validation: ValidationOptions


@dataclass
class PretrainOptions:
    """All options of a run."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    resume: bool = False
    """Continue from the newest checkpoint in train.output_dir; a finished run is left as it is. Options that change the
    training must be the same as at the start of the run."""
    resume_with_changes: bool = False
    """Continue although options that change the training (data, batch, seed, schedule, model) have changed."""

    def decided(self) -> PretrainOptions:
        """A copy with numbers for unset weights (`mlm`, `agreement`, `distillation`), and `mlm_head` if `mlm` is used.

        A fusion head that starts from scratch learns grounding from word prediction and token agreement, and does not
        teach (recipes/results/distillation.md).
        """
        from_scratch = self.model.init is None and self.objective.scores_pairs and "fusion" not in self.model.freeze
        mlm, agreement, distillation = self.objective.mlm, self.objective.agreement, self.objective.distillation
        if mlm is None:
            mlm = 1.0 if from_scratch and self.model.fusion.num_layers else 0.0
        if agreement is None:
            agreement = 1.0 if from_scratch and self.model.fusion.agreement else 0.0
        if distillation is None:
            distillation = 0.0 if from_scratch and self.objective.teacher == "match" else 1.0
        model = replace(self.model, mlm_head=self.model.mlm_head or mlm > 0)
        objective = replace(self.objective, mlm=mlm, agreement=agreement, distillation=distillation)
        return replace(self, model=model, objective=objective)

    def __post_init__(self) -> None:
        weights = ("itc", "itm", "lce", "distillation", "cmd", "cmc", "mlm", "agreement")
        if not any(getattr(self.objective, name) for name in weights):
            raise ValueError(
                f"nothing would be trained: {', '.join(f'objective.{name}' for name in weights)} are all 0"
            )
        rates = (self.train.lr, self.train.backbone_lr, self.train.lora_lr or 0)
        if not any(rates):
            raise ValueError("nothing would be trained: train.lr and train.backbone_lr are both 0")
        if not self.objective.scores_pairs and self.validation.select not in ("auto", "dual"):
            raise ValueError(f"validation.select {self.validation.select!r} needs objective.itm, .lce or .distillation")

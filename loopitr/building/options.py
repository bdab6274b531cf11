"""What `build_model` builds: the `model` part of a run's options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from loopitr.checks import check_at_least

AGREEMENT_WIDTH = 256


@dataclass
class VisionOptions:
    """The image backbone.

    Example:
        >>> from loopitr import VisionOptions
        >>> VisionOptions("vit_small_patch16_224", pooling="mean").image_size
        224
    """

    name: str = "tf_efficientnet_lite0"
    """Any timm model."""
    image_size: int = 224
    """Pixels per side."""
    pretrained: bool = True
    """Start from pretrained weights (a package of the extra `backbones`, else timm's hub)."""
    checkpoint: str | None = None
    """Local weights in timm's names (.safetensors or .pth) instead."""
    pooling: Literal["first", "mean", "backbone"] = "backbone"
    """What the dual head embeds."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.create_model."""


@dataclass
class TextOptions:
    """The text backbone.

    Example:
        >>> from loopitr import TextOptions
        >>> TextOptions("bert-base-uncased", num_layers=6).pooling
        'mean'
    """

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Any transformers encoder: a hub id, a local folder, or a name that a package of the extra `backbones` carries;
    `scenes`: a tokenizer of the built-in vocabulary (with `pretrained: false`)."""
    pretrained: bool = True
    """Start from its weights; otherwise only its architecture and tokenizer are used."""
    num_layers: int | None = None
    """Keep only so many of its lower layers."""
    pooling: Literal["first", "mean", "backbone"] = "mean"
    """What the dual head embeds."""
    max_length: int = 64
    """Captions are cut to so many tokens (cut ones are counted)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Changes to its transformers config."""


@dataclass
class FusionOptions:
    """The fusion head.

    Example:
        >>> from loopitr import FusionOptions
        >>> FusionOptions(num_layers=6, init="text_upper_layers").style
        'late'
    """

    style: Literal["late", "shared"] = "late"
    """Own layers on top of the text backbone (ALBEF), or its own layers run again with cross-attention (BLIP)."""
    num_layers: int = 3
    """Number of fusion layers."""
    num_heads: int | None = None
    """Attention heads; unset: width / 64, or the text backbone's where its layers are copied or shared."""
    intermediate_size: int | None = None
    """Feed-forward width; unset: 4 x width."""
    dropout: float = 0.1
    """Dropout after attention and feed-forward."""
    agreement: bool | int = False
    """Token agreement: words attend to image tokens in a space of their own, cheap enough for all pairs of a batch, and
    what comes of it is added to the match score. A number is the width of that space; true: 256."""
    agreement_dropout: float = 0.0
    """Dropout on the tokens that it compares; frozen backbones and few data want 0.5."""
    init: Literal["random", "text_upper_layers"] = "random"
    """`late`: start the fusion layers from the upper layers of the text backbone (those `text.num_layers` cuts off
    first)."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            "model.fusion",
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
        )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.fusion.dropout must be from 0 to below 1, got {self.dropout}")
        if not 0 <= self.agreement_dropout < 1:
            raise ValueError(f"model.fusion.agreement_dropout must be from 0 to below 1, got {self.agreement_dropout}")
        if not isinstance(self.agreement, bool) and self.agreement < 1:
            raise ValueError(f"model.fusion.agreement must be true, false or a width, at least 1, got {self.agreement}")

    @property
    def agreement_width(self) -> int | None:
        """Width of the token agreement; None: there is none."""
        return (AGREEMENT_WIDTH if self.agreement else None) if isinstance(self.agreement, bool) else self.agreement


@dataclass
class LoraOptions:
    """LoRA adapters on the backbones (the extra `lora`); the dual and the fusion head train as always."""

    vision_rank: int = 0
    """Rank of the image backbone's adapters; 0: none. With them its own weights stay as they are."""
    text_rank: int = 0
    """The same of the text backbone."""
    alpha: float | None = None
    """Updates are scaled by alpha / rank; unset: twice the rank."""
    dropout: float = 0.0
    """On what an adapter reads."""
    targets: list[str] | None = None
    """Layers by name or what their names end in (attn.qkv, query, conv_pw); unset: every linear layer."""

    def __post_init__(self) -> None:
        check_at_least(0, "model.lora", vision_rank=self.vision_rank, text_rank=self.text_rank)
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"model.lora.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout must be from 0 to below 1, got {self.dropout}")
        if self.targets is not None and not self.targets:
            raise ValueError("model.lora.targets is empty; unset means every linear layer")


@dataclass
class ModelOptions:
    """What is trained.

    Example:
        >>> from loopitr import ModelOptions, TextOptions
        >>> ModelOptions(text=TextOptions("bert-base-uncased"), mlm_head=True, freeze=["vision"]).embed_dim
        256
    """

    init: str | None = None
    """Continue from a saved model (folder or hub id); the options below are then ignored but for `lora`, `freeze`,
    `hold_batch_statistics`, `image_size`, and `mlm_head`, which gives a model without one a new one."""
    pair: str | None = None
    """Start from a CLIP or SigLIP checkpoint of transformers (folder or hub id): both towers, the dual head and the
    processor are its own, and only `fusion`, `mlm_head`, `lora`, `freeze` and `image_size` are still read."""
    image_size: int | None = None
    """With `init` or `pair`: take images of another size (positional embeddings are interpolated)."""
    vision: VisionOptions = field(default_factory=VisionOptions)
    text: TextOptions = field(default_factory=TextOptions)
    fusion: FusionOptions = field(default_factory=FusionOptions)
    embed_dim: int = 256
    """E, width of the embeds."""
    projection: Literal["affine", "mlp"] = "affine"
    """From a backbone's pooled vector to the embed: one layer, or two beside a linear map (frozen backbones)."""
    projection_dropout: float = 0.0
    """`projection: mlp`: dropout on the pooled vector and between the layers; 0.5 where data are few."""
    temperature: float = 0.07
    """Initial temperature of the dual head (0.1 for the sigmoid loss)."""
    logit_bias: float | None = None
    """Give the dual head the learned bias that `objective.itc_loss: sigmoid` needs, with this start (SigLIP: -10)."""
    mlm_head: bool = False
    """Carry a masked-language-model head, which `objective.mlm` trains (and asks for). A tokenizer without a mask token
    is given one."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    hold_batch_statistics: bool | None = None
    """Batch norm of the image backbone goes by the statistics it comes with, not by those of the batch; unset: only
    where it comes with weights (`init`, `pair`, `pretrained`, `checkpoint`)."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: vision, text, dual_head, fusion."""

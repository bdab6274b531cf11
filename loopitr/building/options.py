"""The options of `build_model`, which are the `model` part of a run's options."""

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
    """Start from pretrained weights, from a package of the extra `backbones` or else from timm's hub."""
    checkpoint: str | None = None
    """Start from a local file instead (.safetensors or .pth, with timm's names)."""
    pooling: Literal["first", "mean", "backbone"] = "backbone"
    """What the dual head projects: the first token, the mean of the tokens, or the backbone's own pooled vector."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""


@dataclass
class TextOptions:
    """The text backbone.

    Example:
        >>> from loopitr import TextOptions
        >>> TextOptions("bert-base-uncased", num_layers=6).pooling
        'mean'
    """

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Any transformers encoder: a hub id, a local folder, or a model in a package of the extra `backbones`. `scenes`:
    a BERT with a tokenizer for the built-in vocabulary; it needs `pretrained: false`."""
    pretrained: bool = True
    """Start from its weights; otherwise only its architecture and tokenizer are used."""
    num_layers: int | None = None
    """Number of its layers to use, from the lowest; unset: all."""
    pooling: Literal["first", "mean", "backbone"] = "mean"
    """What the dual head projects: the first token, the mean of the tokens, or the backbone's own pooled vector."""
    max_length: int = 64
    """Number of tokens to which captions are cut; the log counts those that were longer."""
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
    """New layers on top of the text backbone (late; ALBEF), or the text backbone's own layers run again with
    cross-attention (shared; BLIP)."""
    num_layers: int = 3
    """Number of fusion layers; 0: token agreement alone scores pairs (`agreement`), which is many times faster."""
    num_heads: int | None = None
    """Attention heads; unset: width / 64, or those of the text backbone if its layers are copied or shared."""
    intermediate_size: int | None = None
    """Feed-forward width; unset: 4 x width."""
    dropout: float = 0.1
    """Dropout after attention and feed-forward."""
    agreement: bool | int = False
    """Token agreement, added to the match score: words attend to image tokens in a space of their own, which is cheap
    enough for all pairs of a batch. A number is the width of that space; true: 256."""
    agreement_dropout: float = 0.0
    """Dropout on the tokens that token agreement compares; use 0.5 with frozen backbones and few data."""
    init: Literal["random", "text_upper_layers"] = "random"
    """`late`: initialise fusion layers at random, or from upper layers of the text backbone, beginning with those that
    `text.num_layers` cuts off."""

    def __post_init__(self) -> None:
        check_at_least(0, "model.fusion", num_layers=self.num_layers)
        check_at_least(
            1,
            "model.fusion",
            num_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
        )
        if not self.num_layers and not self.agreement:
            raise ValueError("model.fusion.num_layers 0 needs model.fusion.agreement: nothing else would score a pair")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.fusion.dropout must be from 0 to below 1, got {self.dropout}")
        if not 0 <= self.agreement_dropout < 1:
            raise ValueError(f"model.fusion.agreement_dropout must be from 0 to below 1, got {self.agreement_dropout}")
        if not isinstance(self.agreement, bool) and self.agreement < 1:
            raise ValueError(f"model.fusion.agreement must be true, false or a width, at least 1, got {self.agreement}")

    @property
    def agreement_width(self) -> int | None:
        """The width of token agreement; None: there is none."""
        return (AGREEMENT_WIDTH if self.agreement else None) if isinstance(self.agreement, bool) else self.agreement


@dataclass
class LoraOptions:
    """LoRA adapters on the backbones, which need the extra `lora`; the dual and the fusion head train as usual."""

    vision_rank: int = 0
    """Rank of the image backbone's adapters; 0: none. With adapters, its own weights are frozen."""
    text_rank: int = 0
    """Rank of the text backbone's adapters; 0: none. With adapters, its own weights are frozen."""
    alpha: float | None = None
    """Updates are scaled by alpha / rank; unset: twice the rank."""
    dropout: float = 0.0
    """Dropout on the inputs of the adapters."""
    targets: list[str] | None = None
    """Names of the layers to adapt, or the ends of their names (attn.qkv, query, conv_pw); unset: all linear layers."""

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
    """The model to train.

    Example:
        >>> from loopitr import ModelOptions, TextOptions
        >>> ModelOptions(text=TextOptions("bert-base-uncased"), mlm_head=True, freeze=["vision"]).embed_dim
        256
    """

    init: str | None = None
    """Continue from a saved model (folder or hub id). Of the options below only `lora`, `freeze`, `image_size`,
    `hold_batch_statistics` and `mlm_head` are then used; the latter adds a head to a model without one."""
    pair: str | None = None
    """Start from a CLIP or SigLIP checkpoint of transformers (folder or hub id), with both towers, dual head and
    processor. Of the options below only `fusion`, `mlm_head`, `lora`, `freeze`, `image_size` and
    `hold_batch_statistics` are then used."""
    image_size: int | None = None
    """With `init` or `pair`: another image size in pixels; positional embeddings are interpolated."""
    vision: VisionOptions = field(default_factory=VisionOptions)
    text: TextOptions = field(default_factory=TextOptions)
    fusion: FusionOptions = field(default_factory=FusionOptions)
    embed_dim: int = 256
    """E, width of the embeds."""
    projection: Literal["affine", "mlp"] = "affine"
    """Map from a backbone's pooled vector to the embed: one layer (affine), or two layers plus a linear map (mlp), made
    for frozen backbones."""
    projection_dropout: float = 0.0
    """`projection: mlp`: dropout on the pooled vector and between the layers; use 0.5 with few data."""
    temperature: float = 0.07
    """Initial temperature of the dual head (0.1 for the sigmoid loss)."""
    logit_bias: float | None = None
    """Initial value of the dual head's learned bias, which `objective.itc_loss: sigmoid` needs (SigLIP: -10); unset: no
    bias."""
    mlm_head: bool = False
    """Add a masked-language-model head, which `objective.mlm` needs and trains, and a mask token to a tokenizer without
    one."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    hold_batch_statistics: bool | None = None
    """Batch norm of the image backbone keeps its statistics instead of using those of the batch. Unset: true if it
    starts from weights (`init`, `pair`, `pretrained`, `checkpoint`)."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: vision, text, dual_head, fusion."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.init is None and self.pair is None:
            raise ValueError(
                f"model.image_size {self.image_size} is the size for a model.init or model.pair; a new model takes "
                "images of model.vision.image_size"
            )

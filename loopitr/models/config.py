"""Configurations: `DualEncoderConfig`, `LoopITRConfig` (with a fusion head), and those of single towers.

A config describes its backbones in full, as a timm name with keyword arguments (`vision`) and a whole transformers
config (`text`), so that a saved folder rebuilds its model without a hub.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from types import NoneType
from typing import Any

from transformers import PreTrainedConfig

POOLINGS = ("first", "mean", "backbone")
PROJECTIONS = ("affine", "linear", "none", "mlp")
FUSION_STYLES = ("late", "shared")
ADAPTED = ("vision", "text")
# Arguments of `timm.create_model` with which it would read files or download them.
FILES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")

VISION_DEFAULTS: dict[str, Any] = {
    "name": "vit_small_patch16_224",
    "image_size": 224,
    "kwargs": {},
}
TEXT_DEFAULTS: dict[str, Any] = {"model_type": "bert"}
FUSION_DEFAULTS: dict[str, Any] = {
    "style": "late",
    "num_layers": 6,
    "num_heads": None,  # None: width / 64.
    "intermediate_size": None,  # None: 4 x width.
    "hidden_act": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.0,  # Attention on the CPU is 2.2 times slower with it.
    "layer_norm_eps": 1e-12,
    # Whether image tokens get learned positions; None: only those of a CNN, which have none from the backbone.
    "image_positions": None,
    # In style `shared`, the token that replaces a text's first one when pairs are scored ([ENC] of BLIP).
    "first_token_id": None,
    # Width A of the token agreement that is added to the match score; None: no token agreement.
    "agreement": None,
    # Dropout on the tokens that token agreement compares.
    "agreement_dropout": 0.0,
}
LORA_DEFAULTS: dict[str, Any] = {
    "rank": 8,
    "alpha": 16.0,  # An update is scaled by alpha / rank.
    "dropout": 0.0,
    "modules": [],  # Full names of the adapted layers in the backbone's model.
}


def _merged(kind: str, given: dict[str, Any] | None, defaults: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(given, (Mapping, NoneType)):
        raise ValueError(f"{kind} must be a mapping, got {given!r}")
    given = dict(given or {})
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(f"unknown {kind} option {unknown[0]!r}; known: {', '.join(sorted(defaults))}")
    return {**defaults, **given}


def _vision(given: dict[str, Any] | None) -> dict[str, Any]:
    vision = _merged("vision", given, VISION_DEFAULTS)
    _positive("vision.image_size", vision["image_size"])
    if vision["image_size"] == 1:  # torch cannot resize images to it.
        raise ValueError("vision.image_size must be at least 2, got 1")
    if not isinstance(vision["kwargs"], Mapping):
        raise ValueError(f"vision.kwargs must be a mapping, got {vision['kwargs']!r}")
    for name in FILES:
        if name in vision["kwargs"]:
            raise ValueError(f"vision.kwargs describe the network, not its weights: {name!r} does not belong there")
    if vision["kwargs"].get("in_chans", 3) != 3:
        raise ValueError(f"images have 3 channels, got vision.kwargs.in_chans {vision['kwargs']['in_chans']!r}")
    return vision


def _text(given: dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(given, (Mapping, NoneType)):
        raise ValueError(f"text must be a mapping, got {given!r}")
    return dict(given or TEXT_DEFAULTS)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_no_layers(fusion: dict[str, Any], *, mlm_head: bool) -> None:
    """Check that a fusion head without layers has token agreement and nothing that needs layers."""
    if fusion["agreement"] is None:
        raise ValueError("fusion.num_layers 0 needs fusion.agreement: otherwise nothing would score a pair")
    if fusion["style"] != "late":
        raise ValueError(f"fusion.num_layers 0 needs fusion.style 'late', got {fusion['style']!r}")
    if fusion["image_positions"]:
        raise ValueError("fusion.num_layers 0 has no use for fusion.image_positions")
    if mlm_head:
        raise ValueError("mlm_head needs fused tokens, which fusion.num_layers 0 does not make")


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


class DualEncoderConfig(PreTrainedConfig):
    """Two backbones and the dual head.

    Args:
        vision: `{"name": timm name, "image_size": pixels per side, "kwargs": arguments of timm.create_model}`; the
            `kwargs` of a ViT may have `norm_eps`, the epsilon of its layer norms.
        text: a transformers config as a dict, `model_type` included.
        vision_pooling, text_pooling: `first` token, `mean` over real tokens, or the `backbone`'s own pooling.
        embed_dim: `E`, the width of the embeds.
        projection: maps pooled vectors to embeds, on both sides: `affine` (weight and bias), `linear` (only a weight;
            CLIP), `none` (pooled vectors have width `E` already; SigLIP) or `mlp` (two layers plus a linear shortcut).
        projection_dropout: for `mlp`, on the pooled vectors and between its layers.
        initial_temperature: initial value of the learned softmax temperature (0.07, CLIP, arXiv 2103.00020).
        max_logit_scale: upper limit of 1 / temperature (100, CLIP; ALBEF allows 1000).
        initial_logit_bias: initial value of the learned bias that the sigmoid loss needs (-10, SigLIP, arXiv
            2303.15343); None: no bias.
        matryoshka_dims: lengths to which embeds may be cut, since these prefixes were trained too
            (`objective.matryoshka_dims`); None: only the whole width was trained.
        lora: LoRA adapters by backbone (`vision`, `text`), see `LORA_DEFAULTS`; None: no adapters.

    Example:
        >>> from loopitr import DualEncoderConfig
        >>> config = DualEncoderConfig(vision={"name": "vit_small_patch16_224"}, text={"model_type": "bert"})
        >>> config.vision["image_size"]
        224
    """

    model_type = "loopitr_dual"

    def __init__(
        self,
        *,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        vision_pooling: str = "backbone",
        text_pooling: str = "mean",
        embed_dim: int = 256,
        projection: str = "affine",
        projection_dropout: float = 0.0,
        initial_temperature: float = 0.07,
        max_logit_scale: float = 100.0,
        initial_logit_bias: float | None = None,
        matryoshka_dims: list[int] | None = None,
        lora: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision = _vision(vision)
        self.text = _text(text)
        if "model_type" not in self.text:
            raise ValueError(f"text needs a model_type (a transformers config as a dict), got keys {sorted(self.text)}")
        _positive("embed_dim", embed_dim)
        _one_of("vision_pooling", vision_pooling, POOLINGS)
        _one_of("text_pooling", text_pooling, POOLINGS)
        _one_of("projection", projection, PROJECTIONS)
        if not 0 <= projection_dropout < 1 or (projection_dropout and projection != "mlp"):
            raise ValueError(
                "projection_dropout must be from 0 to below 1, and needs projection 'mlp', "
                f"got {projection_dropout!r} with {projection!r}"
            )
        if not 0 < initial_temperature < math.inf:
            raise ValueError(f"initial_temperature must be above 0 and finite, got {initial_temperature!r}")
        if not max_logit_scale > 0:
            raise ValueError(f"max_logit_scale must be above 0, got {max_logit_scale!r}")
        self.vision_pooling = vision_pooling
        self.text_pooling = text_pooling
        self.embed_dim = embed_dim
        self.projection = projection
        self.projection_dropout = projection_dropout
        self.initial_temperature = initial_temperature
        self.max_logit_scale = max_logit_scale
        self.initial_logit_bias = initial_logit_bias
        for dim in matryoshka_dims or ():
            _positive("matryoshka_dims", dim)
            if dim > embed_dim:
                raise ValueError(f"matryoshka_dims must be at most embed_dim {embed_dim}, got {dim}")
        self.matryoshka_dims = list(matryoshka_dims) if matryoshka_dims else None
        if not isinstance(lora, (Mapping, NoneType)):
            raise ValueError(f"lora must be a mapping, got {lora!r}")
        for part in lora or ():
            _one_of("lora", part, ADAPTED)
        self.lora = {part: _merged("lora", given, LORA_DEFAULTS) for part, given in (lora or {}).items()} or None
        super().__init__(**kwargs)


class LoopITRConfig(DualEncoderConfig):
    """A dual encoder with a fusion head.

    Args:
        fusion: see `FUSION_DEFAULTS`. `style` is `late` (layers of its own on the text backbone's output; ALBEF,
            LoopITR) or `shared` (the text backbone's last `num_layers` layers run again with cross-attention
            inserted; BLIP). Without layers (`num_layers` 0), token agreement (`agreement`) is the whole head.
        mlm_head: whether the model has a masked-language-model head on the fused tokens.
        similarity_weight: w >= 0 of the reranking score, match score + w x similarity / temperature; 1 until it is
            fitted on held-out data (at the end of every run, and by `recipes/calibrate.py`).

    Example:
        >>> from loopitr import LoopITRConfig
        >>> config = LoopITRConfig(
        ...     vision={"name": "vit_tiny_patch16_224", "image_size": 32},
        ...     text={"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 2},
        ...     fusion={"style": "shared", "num_layers": 1},
        ...     embed_dim=16,
        ... )
        >>> config.dual_config().model_type
        'loopitr_dual'
    """

    model_type = "loopitr"

    def __init__(
        self,
        *,
        fusion: dict[str, Any] | None = None,
        mlm_head: bool = False,
        similarity_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.fusion = _merged("fusion", fusion, FUSION_DEFAULTS)
        _one_of("fusion.style", self.fusion["style"], FUSION_STYLES)
        if self.fusion["num_layers"] == 0 and type(self.fusion["num_layers"]) is int:
            _check_no_layers(self.fusion, mlm_head=mlm_head)
        else:
            _positive("fusion.num_layers", self.fusion["num_layers"])
        for name in ("num_heads", "intermediate_size", "agreement"):
            if self.fusion[name] is not None:
                _positive(f"fusion.{name}", self.fusion[name])
        if self.fusion["first_token_id"] is not None and self.fusion["style"] != "shared":
            raise ValueError(f"fusion.first_token_id needs fusion.style 'shared', got {self.fusion['style']!r}")
        if not 0 <= similarity_weight < math.inf:
            raise ValueError(f"similarity_weight must be a finite number >= 0, got {similarity_weight!r}")
        self.mlm_head = mlm_head
        self.similarity_weight = float(similarity_weight)
        super().__init__(**kwargs)

    def dual_config(self) -> DualEncoderConfig:
        """The config of the dual encoder alone."""
        parameters = inspect.signature(DualEncoderConfig).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        return DualEncoderConfig(**{name: getattr(self, name) for name in names})


class ImageTowerConfig(PreTrainedConfig):
    """The image side of a dual encoder alone; the arguments are those of `DualEncoderConfig`."""

    model_type = "loopitr_image"

    def __init__(
        self,
        *,
        vision: dict[str, Any] | None = None,
        vision_pooling: str = "backbone",
        embed_dim: int = 256,
        projection: str = "affine",
        lora: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision = _vision(vision)
        _one_of("vision_pooling", vision_pooling, POOLINGS)
        self.vision_pooling = vision_pooling
        _set_head(self, embed_dim, projection)
        self.lora = lora
        super().__init__(**kwargs)


class TextTowerConfig(PreTrainedConfig):
    """The text side of a dual encoder alone; the arguments are those of `DualEncoderConfig`."""

    model_type = "loopitr_text"

    def __init__(
        self,
        *,
        text: dict[str, Any] | None = None,
        text_pooling: str = "mean",
        embed_dim: int = 256,
        projection: str = "affine",
        lora: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.text = _text(text)
        _one_of("text_pooling", text_pooling, POOLINGS)
        self.text_pooling = text_pooling
        _set_head(self, embed_dim, projection)
        self.lora = lora
        super().__init__(**kwargs)


def _set_head(config: Any, embed_dim: int, projection: str) -> None:
    _positive("embed_dim", embed_dim)
    _one_of("projection", projection, PROJECTIONS)
    config.embed_dim, config.projection = embed_dim, projection

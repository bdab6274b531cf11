"""Converts BLIP (arXiv 2201.12086) to a `LoopITRModel` of style `shared`, from transformers or the original `.pth`.

The two implementations differ in the first token for matching: the original replaces [CLS] by [ENC]
(`fusion.first_token_id`), transformers' `BlipForImageTextRetrieval` does not (its issue 25629). Each is converted to
the outputs of its own code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BlipForImageTextRetrieval

from loopitr.building.weights import hub_access, load_exactly, refuse
from loopitr.convert.weights import head_count, read_checkpoint, resize_positions
from loopitr.models.config import LoopITRConfig
from loopitr.models.foreign import check_types, config_of, one_line_errors
from loopitr.models.image_backbone import ACTIVATIONS, mlp_ratio
from loopitr.models.loop_model import LoopITRModel

# timm's name of a ViT with BLIP's mean and std; its sizes are set by arguments.
VIT = "vit_base_patch16_clip_224"
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")
CHECKPOINT_FILES = (".pth", ".pt", ".bin", ".safetensors")
# The limits of `temp` in the original's training.
TEMPERATURES = (0.001, 0.5)
# The number of tokens to which the original cuts captions when it evaluates retrieval.
MAX_LENGTH = 35

# Tensors that are not weights of the retrieval model: momentum copies, queues, the caption decoder, a buffer.
DROPPED = re.compile(r"\w+_m\.|text_decoder\.|(image|text|idx)_queue$|(queue_ptr|ptr_queue)$|.*\.position_ids$")

# Patterns of our names and the replacements for the original's; then patterns of the original's names and the
# replacements for transformers'. The first that matches is used.
LAYER = r"text_encoder.encoder.layer.\1.crossattention"
ORIGINAL = (
    (r"dual\.vision\.model\.", "visual_encoder."),
    (r"dual\.text\.model\.", "text_encoder."),
    (r"dual\.vision_projection\.", "vision_proj."),
    (r"dual\.text_projection\.", "text_proj."),
    (r"fusion\.cross\.(\d+)\.(query|key|value)\.", LAYER + r".self.\2."),
    (r"fusion\.cross\.(\d+)\.output\.", LAYER + ".output.dense."),
    (r"fusion\.cross\.(\d+)\.norm\.", LAYER + ".output.LayerNorm."),
)
TRANSFORMERS = (
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)


def original_name(ours: str) -> str:
    """The original checkpoints' name of a tensor with our name `ours`."""
    return _renamed(ours, ORIGINAL)


def transformers_name(ours: str) -> str:
    """The name in `BlipForImageTextRetrieval` of a tensor with our name `ours`."""
    return _renamed(original_name(ours), TRANSFORMERS)


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        if re.match(pattern, name):
            return re.sub("^" + pattern, replacement, name)
    return name


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings that the weights do not show; the defaults are the original's."""

    vision_heads: int | None
    text_heads: int | None
    # Further arguments of the timm model.
    vision: dict[str, Any] = field(default_factory=lambda: {"norm_eps": 1e-6})
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    special_tokens: dict[str, Any] = field(default_factory=lambda: {"pad_token_id": 0})
    logit_scale: float
    max_logit_scale: float
    has_enc_token: bool = False


def convert_blip(
    source: str, *, image_size: int | None = None, vision_heads: int | None = None, text_heads: int | None = None
) -> LoopITRModel:
    """Convert a BLIP retrieval model to a model with the same outputs.

    Args:
        source: an original checkpoint file (for retrieval or from pre-training, whose momentum copies, queues and
            caption decoder are dropped), or the folder or hub id of a `BlipForImageTextRetrieval` of transformers.
        image_size: another image size, to which positions are interpolated; None: that of the source.
        vision_heads, text_heads: the numbers of attention heads; None: those of transformers' config, or width / 64.

    Raises:
        OSError: there is no such file, folder or hub id.
        ValueError: the model is of another kind, or keys are missing, left over or of another shape.
    """
    kind = f"{source}, read as a BLIP checkpoint,"
    if Path(source).is_file() or Path(source).suffix in CHECKPOINT_FILES:
        weights = {name: value for name, value in read_checkpoint(source).items() if not DROPPED.match(name)}
        # Checkpoints of the original's class for inference have no temperature.
        temperature = float(weights.pop("temp", torch.tensor(0.07)))
        settings = _Settings(
            vision_heads=vision_heads,
            text_heads=text_heads,
            logit_scale=-math.log(min(max(temperature, TEMPERATURES[0]), TEMPERATURES[1])),
            max_logit_scale=1 / TEMPERATURES[0],
            has_enc_token=True,
        )
        return _build(weights, original_name, settings, kind, image_size)
    with hub_access(source), one_line_errors(source):
        model_type = config_of(source).get("model_type")
        if model_type != "blip":
            raise ValueError(f"{source} holds a {model_type!r} model, wanted 'blip' (a BlipForImageTextRetrieval)")
        loaded: Any = BlipForImageTextRetrieval.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        check_types(loaded[0], source)
    blip, info = loaded
    refuse(kind, missing=sorted(info["missing_keys"]), left_over=sorted(info["unexpected_keys"]))
    settings = _read_settings(blip.config, vision_heads, text_heads)
    return _build(blip.state_dict(), transformers_name, settings, kind, image_size)


def _read_settings(config: Any, vision_heads: int | None, text_heads: int | None) -> _Settings:
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"vision_config.hidden_act must be one of {known}, got {vision.hidden_act!r}")
    arguments: dict[str, Any] = {"norm_eps": vision.layer_norm_eps}
    if vision.hidden_act != "gelu":
        arguments["act_layer"] = ACTIVATIONS[vision.hidden_act]
    if vision.attention_dropout:
        arguments["attn_drop_rate"] = vision.attention_dropout
    return _Settings(
        vision_heads=vision_heads or vision.num_attention_heads,
        text_heads=text_heads or text.num_attention_heads,
        vision=arguments,
        hidden_act=text.hidden_act,
        layer_norm_eps=text.layer_norm_eps,
        dropout=text.hidden_dropout_prob,
        attention_dropout=text.attention_probs_dropout_prob,
        special_tokens={name: getattr(text, name) for name in SPECIAL_TOKENS},
        logit_scale=config.logit_scale_init_value,
        max_logit_scale=max(100.0, math.ceil(math.exp(config.logit_scale_init_value))),
    )


def _build(
    weights: dict[str, Tensor], name: Callable[[str], str], settings: _Settings, source: str, image_size: int | None
) -> LoopITRModel:
    """Build the model from `weights` with the source's names; `name` maps our names to these."""
    positions = name("dual.vision.model.pos_embed")
    patches = name("dual.vision.model.patch_embed.proj.weight")
    refuse(source, missing=[key for key in (positions, patches) if key not in weights])
    patch, count = weights[patches].shape[-1], weights[positions].shape[1] - 1
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{source} is of images of {count} patches, wanted a square")
    if image_size is None:
        image_size = patch * side
    elif image_size % patch or image_size < 1:
        raise ValueError(f"image_size must be a multiple of the patch size {patch}, got {image_size}")
    model = LoopITRModel(_config(weights, name, settings, source, image_size))
    # BLIP's BERT has no token types; one with a zero embedding is the same.
    types = "dual.text.model.embeddings.token_type_embeddings.weight"
    own = {
        positions: resize_positions(weights[positions], image_size // patch),
        types: torch.zeros_like(model.state_dict()[types]),
        "dual.logit_scale": torch.tensor(settings.logit_scale),
    }
    load_exactly(model, weights | own, source, names={ours: name(ours) for ours in model.state_dict()} | {types: types})
    return model.eval()


def _config(
    weights: dict[str, Tensor], name: Callable[[str], str], settings: _Settings, source: str, image_size: int
) -> LoopITRConfig:
    vision, text = "dual.vision.model", "dual.text.model"
    sized = {
        "patch": f"{vision}.patch_embed.proj.weight",
        "vision_mlp": f"{vision}.blocks.0.mlp.fc1.weight",
        "words": f"{text}.embeddings.word_embeddings.weight",
        "positions": f"{text}.embeddings.position_embeddings.weight",
        "text_mlp": f"{text}.encoder.layer.0.intermediate.dense.weight",
        "projection": "dual.vision_projection.weight",
    }
    refuse(source, missing=[name(ours) for ours in sized.values() if name(ours) not in weights])
    shape = {what: weights[name(ours)].shape for what, ours in sized.items()}
    vision_width, text_width = shape["patch"][0], shape["words"][1]
    layers = _count(weights, name, text + ".encoder.layer.{}.output.dense.weight")
    return LoopITRConfig(
        vision={
            "name": VIT,
            "image_size": image_size,
            "kwargs": {
                "patch_size": shape["patch"][-1],
                "embed_dim": vision_width,
                "depth": _count(weights, name, vision + ".blocks.{}.mlp.fc1.weight"),
                "num_heads": head_count(vision_width, settings.vision_heads, "--vision-heads"),
                "mlp_ratio": mlp_ratio(shape["vision_mlp"][0], vision_width),
                "pre_norm": False,
                **settings.vision,
            },
        },
        text={
            "model_type": "bert",
            "vocab_size": shape["words"][0],
            "hidden_size": text_width,
            "num_hidden_layers": layers,
            "num_attention_heads": head_count(text_width, settings.text_heads, "--text-heads"),
            "intermediate_size": shape["text_mlp"][0],
            "max_position_embeddings": shape["positions"][0],
            "type_vocab_size": 1,
            "hidden_act": settings.hidden_act,
            "layer_norm_eps": settings.layer_norm_eps,
            "hidden_dropout_prob": settings.dropout,
            "attention_probs_dropout_prob": settings.attention_dropout,
            **settings.special_tokens,
        },
        vision_pooling="first",
        text_pooling="first",
        embed_dim=shape["projection"][0],
        initial_temperature=math.exp(-settings.logit_scale),
        max_logit_scale=float(settings.max_logit_scale),
        fusion={
            "style": "shared",
            "num_layers": layers,
            "dropout": settings.dropout,
            "attention_dropout": settings.attention_dropout,
            "layer_norm_eps": settings.layer_norm_eps,
            "image_positions": False,
            # [ENC] is the last entry of the vocabulary.
            "first_token_id": shape["words"][0] - 1 if settings.has_enc_token else None,
        },
    )


def _count(weights: dict[str, Tensor], name: Callable[[str], str], ours: str) -> int:
    count = 0
    while name(ours.format(count)) in weights:
        count += 1
    return count

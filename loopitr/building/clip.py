"""Reads a CLIP or SigLIP checkpoint of transformers as a `DualEncoder`: both towers and the dual head.

The image tower becomes a timm ViT, the text tower stays the model of transformers, and projections, temperature and
bias become the dual head's. So the similarities before training are the checkpoint's own.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedTokenizerBase

from loopitr.building.text import describe_text, load_tokenizer
from loopitr.building.weights import first_keys, hub_access, local_or_hub
from loopitr.models.foreign import check_types, config_of, one_line_errors
from loopitr.models.image_backbone import ACTIVATIONS, mlp_ratio

# timm's ViTs of these model types; arguments change their size.
TIMM_NAMES = {"clip": "vit_base_patch16_clip_224", "siglip": "vit_base_patch16_siglip_224"}
# The activations of image towers that can be converted.
KNOWN_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new")
# Patterns of parameter names in transformers' image towers, and the replacements for timm's names.
RENAMED = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)


@dataclass(frozen=True)
class Pair:
    """A pair of towers: the arguments of its `DualEncoderConfig`, and the state dict of that `DualEncoder`."""

    config_values: dict[str, Any]
    weights: dict[str, Tensor]
    image_processor: Any
    tokenizer: PreTrainedTokenizerBase


def load_pair(name: str) -> Pair:
    """Read a folder or hub id.

    Raises:
        ValueError: the model is of another kind, weights are missing, or timm's ViT cannot represent its image tower.
        OSError: there is no such folder or hub id, or a file is missing.
    """
    source = local_or_hub(name, "the pair")
    with hub_access(name), one_line_errors(f"model.pair {name}"):
        config_of(source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in TIMM_NAMES:
            hint = "; use a SigLIP 2 of fixed size, not NaFlex" if config.model_type == "siglip2" else ""
            raise ValueError(f"model.pair {name} holds a {config.model_type!r} model, wanted 'clip' or 'siglip'{hint}")
        tokenizer = load_tokenizer(source)
        images = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        model, info = AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        check_types(model, source)
    if info["missing_keys"]:
        raise ValueError(f"model.pair {name}: missing weights {first_keys(sorted(info['missing_keys']))}")
    state = model.state_dict()
    return Pair(describe_pair(config, state, tokenizer), convert_pair(state), images, tokenizer)


def describe_pair(
    config: PreTrainedConfig, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The arguments of `DualEncoderConfig` for a `CLIPConfig` or `SiglipConfig` and the model's weights."""
    clip = config.model_type == "clip"
    scale = float(state["logit_scale"].exp())
    bias = state.get("logit_bias")
    return {
        "vision": _describe_vision(config.vision_config, TIMM_NAMES[config.model_type]),
        "vision_pooling": "first" if clip else "backbone",
        "text": describe_text(config.text_config, tokenizer),
        "text_pooling": "backbone",
        "embed_dim": config.projection_dim if clip else config.text_config.projection_size,
        "projection": "linear" if clip else "none",
        "initial_temperature": 1 / scale,
        "initial_logit_bias": None if bias is None else float(bias),
        "max_logit_scale": max(100.0 if clip else 1000.0, float(math.ceil(scale))),  # SigLIP's scale is above 100.
    }


def _describe_vision(config: PreTrainedConfig, name: str) -> dict[str, Any]:
    if config.hidden_act not in KNOWN_ACTIVATIONS:
        raise ValueError(
            f"activation {config.hidden_act!r} of the image tower is none of {', '.join(KNOWN_ACTIVATIONS)}"
        )
    if not getattr(config, "vision_use_head", True):
        raise ValueError("the image tower has no pooling head (vision_use_head is false), so it embeds nothing")
    kwargs = {
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio(config.intermediate_size, config.hidden_size),
        "act_layer": ACTIVATIONS[config.hidden_act],
        "norm_eps": config.layer_norm_eps,
    }
    return {"name": name, "image_size": config.image_size, "kwargs": kwargs}


def convert_pair(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a `CLIPModel` or `SiglipModel` to that of the `DualEncoder` of `describe_pair`."""
    towers: dict[str, dict[str, Tensor]] = {"text_model": {}, "vision_model": {}}
    weights = {}
    for name, value in state.items():
        tower, _, rest = name.partition(".")
        if tower in towers:
            towers[tower][rest] = value
        elif tower in ("logit_scale", "logit_bias"):
            weights[name] = value.reshape(())
        else:
            weights[name.replace("visual_projection", "vision_projection")] = value
    weights.update({f"text.model.{name}": value for name, value in towers["text_model"].items()})
    weights.update({f"vision.model.{name}": value for name, value in _in_timm_names(towers["vision_model"]).items()})
    return weights


def _in_timm_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, value in theirs.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if name == "cls_token":
            ours[name] = value[None, None]  # [1, 1, D]
        elif name == "pos_embed":
            ours[name] = value[None]  # [1, N, D]
        elif ".self_attn.q_proj." in name:
            block, kind = name.split(".self_attn.q_proj.")
            keys = [f"encoder.layers.{block.removeprefix('blocks.')}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            ours[f"{block}.attn.qkv.{kind}"] = torch.cat([theirs[key] for key in keys])  # [3 D, D] or [3 D]
        elif name.startswith("head.attention.in_proj_"):
            kind = name.removeprefix("head.attention.in_proj_")
            query, *keys_values = value.chunk(3)
            ours[f"attn_pool.q.{kind}"] = query
            ours[f"attn_pool.kv.{kind}"] = torch.cat(keys_values)  # [2 D, D] or [2 D]
        elif ".self_attn." not in name:  # Keys and values were joined to their query above.
            ours[name] = value
    return ours

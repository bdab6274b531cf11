"""Converts a `LoopITRModel` of style `shared` to a `BlipForImageTextRetrieval` of transformers with equal outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

from loopitr.building.folders import check_output
from loopitr.building.weights import load_exactly
from loopitr.convert.blip import SPECIAL_TOKENS, transformers_name
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.processing import LoopITRProcessor

ACTIVATIONS = {"GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu", "SiLU": "silu"}
TRAINING_ONLY = ("dual.logit_scale", "dual.logit_bias", "mlm_head.")  # BLIP has the first in its config.


def to_blip(model: LoopITRModel, out: str | Path, *, processor: LoopITRProcessor | None = None) -> None:
    """Write a folder that `BlipForImageTextRetrieval.from_pretrained` loads, with equal similarities and ITM logits.

    A masked-language-model head is left out.

    Args:
        processor: saved with the model as a `BlipProcessor`.

    Raises:
        ValueError: BLIP cannot represent the model or its processor (the line names the first reason), or `out` holds a
            model of another kind.
    """
    folder = check_output(out, BlipConfig.model_type)
    for name, got, wanted in _comparison(model):
        if got != wanted:
            raise ValueError(f"a BLIP model has no place for {name} {got!r}, wanted {wanted!r}")
    written = None if processor is None else _processor(processor)
    blip = BlipForImageTextRetrieval(_config(model))
    weights = {
        transformers_name(name): value.detach()
        for name, value in model.state_dict().items()
        if not name.startswith(TRAINING_ONLY)
    }
    types = weights.pop("text_encoder.embeddings.token_type_embeddings.weight")
    # Every token is of type 0. BLIP's embeddings have no types, so the one of type 0 is added to its positions.
    positions = "text_encoder.embeddings.position_embeddings.weight"
    weights[positions] = weights[positions] + types[0]
    load_exactly(blip, weights, f"this {type(model).__name__}")
    blip.save_pretrained(folder)
    if written is not None:
        written.save_pretrained(folder)


def _comparison(model: LoopITRModel) -> Iterator[tuple[str, Any, Any]]:
    """(name, value of the model, value of BLIP) of each property, which may rely on those before it being equal."""
    config, text, vit = model.config, model.dual.text.model, model.dual.vision.model
    fusion = config.fusion
    yield "LoRA adapters (merge them first):", bool(config.lora), False
    yield "fusion.style", fusion["style"], "shared"
    yield "fusion.num_layers", fusion["num_layers"], text.config.num_hidden_layers
    yield "fusion.layer_norm_eps", fusion["layer_norm_eps"], text.config.layer_norm_eps
    # The matching scores of transformers are those without [ENC].
    yield "fusion.first_token_id", fusion["first_token_id"], None
    yield "fusion.agreement", fusion["agreement"], None
    yield "text model", text.config.model_type, "bert"
    yield "text is_decoder", bool(getattr(text.config, "is_decoder", False)), False
    yield "text_pooling", config.text_pooling, "first"
    yield "projection", config.projection, "affine"
    yield "image backbone", type(vit).__name__, VisionTransformer.__name__
    first = config.vision_pooling == "backbone" and vit.global_pool == "token" and type(vit.fc_norm) is nn.Identity
    yield "vision_pooling", "first" if first else config.vision_pooling, "first"
    yield "fusion.image_positions", bool(fusion["image_positions"]), False
    yield "image class token", vit.has_class_token, True
    yield "image register tokens", vit.num_reg_tokens, 0
    yield "image patch embedding", type(vit.patch_embed).__name__, PatchEmbed.__name__
    grid = vit.patch_embed.grid_size
    yield "image grid", grid, (grid[0], grid[0])
    count = None if vit.pos_embed is None else vit.pos_embed.shape[1]
    yield "number of image positions", count, grid[0] * grid[1] + 1
    for name, module in (("norm_pre", vit.norm_pre), ("patch_embed.norm", vit.patch_embed.norm)):
        yield f"image {name}", type(module).__name__, nn.Identity.__name__
    plain = Block(dim=8, num_heads=1, qkv_bias=True, device="meta")
    yield "image final norm", type(vit.norm).__name__, type(plain.norm1).__name__
    eps, act = vit.norm.eps, _activation(vit.blocks[0].mlp.act)
    for index, block in enumerate(vit.blocks):
        modules = dict(block.named_modules())
        for name, wanted in plain.named_modules():
            if "drop" not in name and not name.endswith(".act"):  # Dropout has no effect in eval mode.
                where = f"image blocks.{index}.{name}".rstrip(".")
                yield where, type(modules.get(name)).__name__, type(wanted).__name__
        yield f"image blocks.{index} epsilons", {block.norm1.eps, block.norm2.eps}, {eps}
        yield f"image blocks.{index} activation", _activation(block.mlp.act), act
    yield "image activation", act, act if act in {"gelu", *ACTIVATIONS.values()} else "gelu"


def _activation(module: nn.Module) -> str:
    """The name of an activation in transformers, or timm's if transformers has none."""
    if isinstance(module, nn.GELU) or type(module).__name__ == "GELU":
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_pytorch_tanh"
    return ACTIVATIONS.get(type(module).__name__, type(module).__name__)


def _config(model: LoopITRModel) -> BlipConfig:
    vit, text = model.dual.vision.model, model.dual.text.model.config
    block = vit.blocks[0]
    special = {name: getattr(text, name) for name in SPECIAL_TOKENS if hasattr(text, name)}
    return BlipConfig(
        vision_config={
            "hidden_size": vit.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(vit.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": model.dual.vision.image_size,
            "patch_size": vit.patch_embed.patch_size[0],
            "hidden_act": _activation(block.mlp.act),
            "layer_norm_eps": vit.norm.eps,
            "attention_dropout": block.attn.attn_drop.p,
        },
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "max_position_embeddings": text.max_position_embeddings,
            "hidden_act": text.hidden_act,
            "layer_norm_eps": text.layer_norm_eps,
            "hidden_dropout_prob": text.hidden_dropout_prob,
            "attention_probs_dropout_prob": text.attention_probs_dropout_prob,
            **special,
        },
        image_text_hidden_size=model.config.embed_dim,
        logit_scale_init_value=model.dual.logit_scale.item(),
    )


def _processor(processor: LoopITRProcessor) -> BlipProcessor:
    images = processor.image_processor
    for name, got, wanted in (
        ("do_center_crop", bool(getattr(images, "do_center_crop", False)), False),
        ("size", sorted(dict(images.size)), ["height", "width"]),
    ):
        if got != wanted:
            raise ValueError(f"a BlipImageProcessor has no place for {name} {got!r}, wanted {wanted!r}")
    names = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    arguments = {name: getattr(images, name) for name in names}
    # The tokenizer is copied because BlipProcessor changes it.
    return BlipProcessor(BlipImageProcessor(**arguments), copy.deepcopy(processor.tokenizer))

"""Converts ALBEF checkpoints (arXiv 2107.07651, github.com/salesforce/ALBEF): pre-trained and fine-tuned ones.

They have two layouts: that of pre-training (`text_encoder.bert.*` and a masked-language-model head, which is kept) and
that of retrieval (`text_encoder.*`). The text layers below the first cross-attention become the text backbone, the
others the fusion head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loopitr.building.weights import load_exactly, refuse
from loopitr.convert.weights import head_count, read_checkpoint, resize_positions
from loopitr.models.config import LoopITRConfig
from loopitr.models.image_backbone import mlp_ratio
from loopitr.models.loop_model import LoopITRModel

# The number of tokens to which the original cuts captions when it evaluates retrieval.
MAX_LENGTH = 30
# The lower limit of `temp` in the original's training.
SMALLEST_TEMPERATURE = 0.001
MLM = "text_encoder.cls.predictions."

# Tensors that are not weights of the model: momentum copies, queues, and a buffer of position numbers.
DROPPED = re.compile(
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\.|(image_queue|text_queue|idx_queue|queue_ptr|ptr_queue)$"
    r"|text_encoder\.(bert\.)?embeddings\.position_ids$"
)
# Patterns of the beginnings of our names, and the replacements for the original's: `{text}` stands for the text
# encoder's prefix, `{layer}` for that of the fusion layer.
RENAMED = (
    (r"dual\.vision\.model\.", "visual_encoder."),
    (r"dual\.text\.model\.", "{text}"),
    (r"dual\.(vision|text)_projection\.", r"\1_proj."),
    (r"dual\.logit_scale", "temp"),
    (r"fusion\.text\.\d+\.(query|key|value)\.", r"{layer}.attention.self.\1."),
    (r"fusion\.text\.\d+\.attention_output\.", "{layer}.attention.output.dense."),
    (r"fusion\.text\.\d+\.attention_norm\.", "{layer}.attention.output.LayerNorm."),
    (r"fusion\.text\.\d+\.feed_forward_in\.", "{layer}.intermediate.dense."),
    (r"fusion\.text\.\d+\.feed_forward_out\.", "{layer}.output.dense."),
    (r"fusion\.text\.\d+\.feed_forward_norm\.", "{layer}.output.LayerNorm."),
    (r"fusion\.cross\.\d+\.(query|key|value)\.", r"{layer}.crossattention.self.\1."),
    (r"fusion\.cross\.\d+\.output\.", "{layer}.crossattention.output.dense."),
    (r"fusion\.cross\.\d+\.norm\.", "{layer}.crossattention.output.LayerNorm."),
    (r"mlm_head\.dense\.", f"{MLM}transform.dense."),
    (r"mlm_head\.norm\.", f"{MLM}transform.LayerNorm."),
    (r"mlm_head\.bias", f"{MLM}bias"),
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a network, read from the shapes of its weights; `text` is the prefix of the text encoder's names."""

    text: str
    vision_width: int
    vision_depth: int
    patch_size: int
    grid: int
    mlp_width: int
    vocab_size: int
    text_width: int
    text_length: int
    token_types: int
    text_inner_width: int
    text_depth: int
    fusion_depth: int
    embed_dim: int
    mlm_head: bool


def convert_albef(
    source: str | Path,
    *,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> LoopITRModel:
    """Convert an ALBEF checkpoint to a model in eval mode with the original's outputs.

    Args:
        source: a `.pth` file of either layout.
        image_size: another image size; positions are interpolated like in the original.
        vision_heads, text_heads: the numbers of attention heads, which shapes do not show; None: width / 64.

    Raises:
        OSError: there is no such file.
        ValueError: it is not an ALBEF checkpoint; the line says which keys are missing or left over.
    """
    kind = f"{source}, read as an ALBEF checkpoint,"
    weights = {name: value for name, value in read_checkpoint(source).items() if not DROPPED.match(name)}
    sizes = read_sizes(weights, kind)
    size = sizes.grid * sizes.patch_size if image_size is None else image_size
    temperature = float(weights["temp"])
    if not temperature > 0:
        raise ValueError(f"{source}: temp is {temperature}, wanted a positive temperature")
    config = _config(
        sizes,
        image_size=size,
        temperature=temperature,
        vision_heads=head_count(sizes.vision_width, vision_heads, "--vision-heads"),
        text_heads=head_count(sizes.text_width, text_heads, "--text-heads"),
    )
    model = LoopITRModel(config)
    if sizes.mlm_head:
        _drop_tied(weights, f"{MLM}decoder.weight", f"{sizes.text}embeddings.word_embeddings.weight")
        _drop_tied(weights, f"{MLM}decoder.bias", f"{MLM}bias")
    positions = weights["visual_encoder.pos_embed"]
    weights["visual_encoder.pos_embed"] = resize_positions(positions, size // sizes.patch_size)
    weights["temp"] = torch.tensor(-math.log(temperature))
    load_exactly(model, weights, kind, names={ours: original_name(ours, sizes) for ours in model.state_dict()})
    return model.eval()


def read_sizes(weights: Mapping[str, Tensor], source: str) -> Sizes:
    """Read the sizes of a network from its weights.

    Raises:
        ValueError: keys are missing or of another shape, or every text layer has cross-attention (as in BLIP).
    """
    text = "text_encoder.bert." if any(name.startswith("text_encoder.bert.") for name in weights) else "text_encoder."
    text_depth = _count(weights, rf"{re.escape(text)}encoder\.layer\.(\d+)\.")
    last = f"{text}encoder.layer.{max(text_depth - 1, 0)}."
    # The weights from which sizes are read, with their numbers of dimensions.
    dimensions = {
        "visual_encoder.pos_embed": 3,
        "visual_encoder.patch_embed.proj.weight": 4,
        "visual_encoder.blocks.0.mlp.fc1.weight": 2,
        f"{text}embeddings.word_embeddings.weight": 2,
        f"{text}embeddings.position_embeddings.weight": 2,
        f"{text}embeddings.token_type_embeddings.weight": 2,
        f"{text}encoder.layer.0.intermediate.dense.weight": 2,
        f"{last}crossattention.self.query.weight": 2,
        "vision_proj.weight": 2,
        "temp": 0,
    }
    ours = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
    missing = [name for name in dimensions if name not in weights]
    if missing:
        left_over = [name for name in weights if not name.startswith(ours) and name != "temp"]
        refuse(source, missing=missing, left_over=left_over)
    misshapen = [name for name, count in dimensions.items() if weights[name].ndim != count]
    refuse(source, other_shape=[f"{name} {list(weights[name].shape)}" for name in misshapen])
    first = f"{text}encoder.layer.0.crossattention."
    refuse(source, left_over=[name for name in weights if name.startswith(first)])
    positions, patch, mlp, words, places, types, inner, _, projection, _ = (weights[name].shape for name in dimensions)
    grid = math.isqrt(positions[1] - 1)
    if grid**2 != positions[1] - 1:
        refuse(source, other_shape=[f"visual_encoder.pos_embed {list(positions)} (wanted [1, 1 + a square, width])"])
    fusion = re.compile(rf"{re.escape(text)}encoder\.layer\.(\d+)\.crossattention\.")
    fusion_from = min(int(match[1]) for match in map(fusion.match, weights) if match)
    return Sizes(
        text=text,
        vision_width=positions[2],
        vision_depth=_count(weights, r"visual_encoder\.blocks\.(\d+)\."),
        patch_size=patch[-1],
        grid=grid,
        mlp_width=mlp[0],
        vocab_size=words[0],
        text_width=words[1],
        text_length=places[0],
        token_types=types[0],
        text_inner_width=inner[0],
        text_depth=fusion_from,
        fusion_depth=text_depth - fusion_from,
        embed_dim=projection[0],
        mlm_head=any(name.startswith(MLM) for name in weights),
    )


def original_name(ours: str, sizes: Sizes) -> str:
    """The checkpoint's name of a tensor with our name `ours`."""
    for beginning, theirs in RENAMED:
        if match := re.match(beginning, ours):
            number = re.match(r"fusion\.\w+\.(\d+)", ours)
            layer = sizes.text_depth + (int(number[1]) if number else 0)
            renamed = match.expand(theirs) + ours[match.end() :]
            return renamed.format(text=sizes.text, layer=f"{sizes.text}encoder.layer.{layer}")
    return ours  # This is for itm_head, whose names are the same.


def _drop_tied(weights: dict[str, Tensor], name: str, first: str) -> None:
    """Drop the second name of a tied tensor; if the two differ, it stays and will be reported as left over."""
    if name in weights and first in weights and torch.equal(weights[name], weights[first]):
        del weights[name]


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number that `pattern` finds in the names."""
    return max((int(match[1]) + 1 for match in map(re.compile(pattern).match, weights) if match), default=0)


def _config(sizes: Sizes, *, image_size: int, temperature: float, vision_heads: int, text_heads: int) -> LoopITRConfig:
    vision = {
        "patch_size": sizes.patch_size,
        "embed_dim": sizes.vision_width,
        "depth": sizes.vision_depth,
        "num_heads": vision_heads,
        "mlp_ratio": mlp_ratio(sizes.mlp_width, sizes.vision_width),
    }
    text = {
        "model_type": "bert",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.text_width,
        "num_hidden_layers": sizes.text_depth,
        "num_attention_heads": text_heads,
        "intermediate_size": sizes.text_inner_width,
        "hidden_act": "gelu",
        "max_position_embeddings": sizes.text_length,
        "type_vocab_size": sizes.token_types,
        "layer_norm_eps": 1e-12,
    }
    fusion = {
        "style": "late",
        "num_layers": sizes.fusion_depth,
        "num_heads": text_heads,
        "intermediate_size": sizes.text_inner_width,
    }
    return LoopITRConfig(
        vision={"name": "vit_base_patch16_384", "image_size": image_size, "kwargs": vision},
        text=text,
        vision_pooling="first",
        text_pooling="first",
        embed_dim=sizes.embed_dim,
        initial_temperature=temperature,
        max_logit_scale=1 / SMALLEST_TEMPERATURE,
        fusion=fusion,
        mlm_head=sizes.mlm_head,
    )

"""What every converter does: read a checkpoint without running code from it, and write a model folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, PreTrainedTokenizerBase

from loopitr.building.card import write_card
from loopitr.building.folders import check_output
from loopitr.building.weights import hub_access, listed, text_source
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.processing import LoopITRProcessor, image_processor

# Training scripts put their weights under these keys.
WRAPPERS = ("model", "state_dict")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights in a `.safetensors` or torch file, on the CPU; a top-level `model` or `state_dict` is unwrapped.

    Raises:
        OSError: no such file, or a folder.
        ValueError: not a checkpoint, or one that holds Python objects beside its tensors.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise IsADirectoryError(f"{path} is a folder, wanted a checkpoint file (.pth, .pt, .bin or .safetensors)")
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    content: Any = _load_safetensors(file) if file.suffix == ".safetensors" else _load_torch(file)
    while isinstance(content, Mapping):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted a dictionary of weights")
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"{path} holds no weights, only {listed(map(str, content))}")
    return weights


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from error


def _load_torch(file: Path) -> Any:
    try:
        return torch.load(str(file), map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises several kinds, with advice to switch the check off.
        if re.search("unsupported (global|class)|not an allowed global", str(error), re.IGNORECASE):
            reason = "holds Python objects beside its tensors; reading those could run code: save its weights alone"
        else:
            reason = "is not a checkpoint that torch can read, or not a whole one"
        raise ValueError(f"{file} {reason}") from error


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """A ViT's positions `[1, 1 + g * g, D]` -> `[1, 1 + grid * grid, D]` as ALBEF's and BLIP's `interpolate_pos_embed`.

    Not `LoopITRModel.resize_images`: timm's resampling smooths, and the numbers would not be the original's.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    patches = positions[:, 1:].transpose(1, 2).unflatten(-1, (side, side)).float()  # [1, D, g, g]
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2).to(positions.dtype)], 1)


def head_count(width: int, given: int | None, option: str) -> int:
    """Attention heads: as given, else of width 64.

    Raises:
        ValueError: a width that is no multiple of the heads, or of 64 where none are given.
    """
    if given is None and width % 64:
        raise ValueError(f"weights do not tell the number of attention heads of a width {width}: give {option}")
    count = width // 64 if given is None else given
    if count < 1 or width % count:
        raise ValueError(f"{option} is {count}, wanted a divisor of the width {width}")
    return count


def clip_images(model: LoopITRModel) -> CLIPImageProcessor:
    """Images as ALBEF and BLIP evaluate them: the whole image, bicubic, CLIP's mean and std."""
    size = model.config.vision["image_size"]
    return image_processor(size, mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic")


def save_converted(
    model: LoopITRModel, out: str | Path, *, tokenizer: str | None, max_length: int, source: str | None = None
) -> None:
    """Write what `LoopITRModel.from_pretrained` loads and, with a tokenizer, `LoopITRProcessor.from_pretrained` and a
    card.

    Args:
        source: what was converted; a hub id is named in the card.
        tokenizer: a folder, a hub id, or a name that a package of the extra `backbones` carries.
        max_length: captions are cut to so many tokens, as the original evaluates.

    Raises:
        OSError: no such tokenizer, or `out` cannot be written.
        ValueError: a tokenizer with more words than the model, or `out` holds a model of another kind.
    """
    folder = check_output(out, LoopITRModel.config_class.model_type)
    words = None if tokenizer is None else _tokenizer(model, tokenizer, max_length)
    model.save_pretrained(folder)
    if words is not None:
        LoopITRProcessor(clip_images(model), words).save_pretrained(folder)
        write_card(folder, model, base_model=source)


def _tokenizer(model: LoopITRModel, name: str, max_length: int) -> PreTrainedTokenizerBase:
    with hub_access(name):
        tokenizer = AutoTokenizer.from_pretrained(text_source(name), trust_remote_code=False)
    known = model.config.text["vocab_size"]
    if len(tokenizer) > known:
        raise ValueError(f"the tokenizer of {name} has {len(tokenizer)} words, but the model knows {known}")
    tokenizer.model_max_length = min(max_length, tokenizer.model_max_length, model.dual.text.max_length)
    return tokenizer

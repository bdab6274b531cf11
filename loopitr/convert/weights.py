"""Common parts of the converters: reading checkpoints without running their code, and writing model folders."""

from __future__ import annotations

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
from loopitr.models.foreign import refused_objects
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.processing import LoopITRProcessor, image_processor
from loopitr.reading import user_path

# The keys under which training scripts save weights.
WRAPPERS = ("model", "state_dict")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights in a `.safetensors` or torch file, on the CPU; a top-level `model` or `state_dict` is unwrapped.

    Raises:
        OSError: there is no such file, or it is a folder.
        ValueError: it is not a checkpoint, or holds Python objects besides tensors.
    """
    file = user_path(path)
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
        raise ValueError(f"{file} is not a complete safetensors file ({error})") from error


def _load_torch(file: Path) -> Any:
    try:
        return torch.load(str(file), map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises errors of several kinds, and advises to switch this check off.
        reason = refused_objects(error) or "it is not a checkpoint that torch can read, or is incomplete"
        raise ValueError(f"{file}: {reason}") from error


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """A ViT's positions `[1, 1 + g * g, D]` -> `[1, 1 + grid * grid, D]`, like ALBEF's and BLIP's interpolation.

    `LoopITRModel.resize_images` uses timm's resampling, which antialiases and so would change the outputs.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if side == grid:
        return positions
    patches = positions[:, 1:].transpose(1, 2).unflatten(-1, (side, side)).float()  # [1, D, g, g]
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2).to(positions.dtype)], 1)


def head_count(width: int, given: int | None, option: str) -> int:
    """The number of attention heads: as given, or width / 64; `option` is its name in errors.

    Raises:
        ValueError: the width is not a multiple of the number of heads, or of 64 if none is given.
    """
    if given is None and width % 64:
        raise ValueError(f"weights do not show the number of attention heads for width {width}: give {option}")
    count = width // 64 if given is None else given
    if count < 1 or width % count:
        raise ValueError(f"{option} is {count}, wanted a divisor of the width {width}")
    return count


def clip_images(model: LoopITRModel) -> CLIPImageProcessor:
    """The image processor of ALBEF's and BLIP's evaluation: the whole image, bicubic, with CLIP's mean and std."""
    size = model.config.vision["image_size"]
    return image_processor(size, mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic")


def save_converted(
    model: LoopITRModel, out: str | Path, *, tokenizer: str | None, max_length: int, source: str | None = None
) -> None:
    """Save a converted model and, with a tokenizer, its processor and card.

    Args:
        tokenizer: a folder, a hub id, or a model in a package of the extra `backbones`.
        max_length: the number of tokens to which captions are cut.
        source: the source of the conversion; the card names it if it is a hub id.

    Raises:
        OSError: there is no such tokenizer, or `out` cannot be written.
        ValueError: the tokenizer has more words than the model, or `out` holds a model of another kind.
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
    vocab_size = model.config.text["vocab_size"]
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer of {name} has {len(tokenizer)} words, but the model knows {vocab_size}")
    tokenizer.model_max_length = min(max_length, tokenizer.model_max_length, model.dual.text.max_length)
    return tokenizer

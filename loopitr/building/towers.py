"""Loads one tower of a saved model, without reading the weights of the other."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopitr.building.folders import model_source, saved_class
from loopitr.building.sizes import check_sizes
from loopitr.building.weights import hub_access
from loopitr.models.foreign import check_shards, check_types, check_weights, one_line_errors, weight_files
from loopitr.models.processing import LoopITRProcessor
from loopitr.models.towers import TOWERS, ImageTower, TextTower, tower_config, tower_prefixes

DUAL = "dual."  # prefix of the dual encoder's parameters in a model with a fusion head


def load_tower(
    path: str | Path, tower: str, *, dtype: torch.dtype | None = None
) -> tuple[ImageTower | TextTower, LoopITRProcessor]:
    """The image or the text tower, in eval mode, of a run folder, an exported dual encoder, or a hub id.

    Args:
        tower: `image` or `text`.
        dtype: the type of the weights; None: as saved.

    Raises:
        OSError: there is no model, a file is missing or damaged, or the hub cannot be reached or does not know the id.
        ValueError: the model is of another kind, or its weights do not fit its config.
    """
    source = model_source(path)
    with nullcontext() if Path(source).is_dir() else hub_access(source):
        kind, _ = saved_class(source, path)
        check_shards(source)
        with one_line_errors(source):
            config: Any = kind.config_class.from_pretrained(source)
        processor = LoopITRProcessor.from_pretrained(source)
        folder = Path(source) if Path(source).is_dir() else _downloaded(source)
    try:
        weights = _weights(folder, tower)
    except SafetensorError as error:
        raise OSError(f"{path}: its weights are damaged ({error})") from error
    with one_line_errors(source):
        model: Any = TOWERS[tower](tower_config(config, tower))  # type: ignore[arg-type]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: config.json does not fit the weights of its {tower} tower ({error})") from error
    with one_line_errors(source):
        _convert(model, next(iter(weights.values())).dtype if dtype is None else dtype)
    check_types(model, str(folder))
    check_weights(model, source)
    check_sizes(model, processor, source)
    return model.eval(), processor


def _convert(model: ImageTower | TextTower, dtype: torch.dtype) -> None:
    """Convert a tower as transformers loads it: buffers of a text encoder that are not saved, such as the frequencies
    of rotary positions, stay precise.
    """
    saved = model.state_dict().keys()
    exact = {name: own for name, own in model.named_buffers() if name.startswith("text.") and name not in saved}
    model.to(dtype)  # type: ignore[arg-type]
    for name, buffer in exact.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, buffer)


def _downloaded(source: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))


def _weights(folder: Path, tower: str) -> dict[str, Tensor]:
    """A tower's tensors by their names in the tower, from the same files of a folder as the whole model.

    Raises:
        OSError: there are none.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(str(folder)):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (`opened` is not a dictionary)
                own = name.removeprefix(DUAL)
                if own.startswith(tower_prefixes(tower)):
                    weights[own] = opened.get_tensor(name)
    if not weights:
        raise OSError(f"{folder} holds no weights of {'an image' if tower == 'image' else 'a text'} tower")
    # Copies do not depend on the mapped file.
    return {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in weights.items()}

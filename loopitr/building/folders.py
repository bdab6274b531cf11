"""Saved models: which folder, which class, with its processor."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from loopitr.building.card import write_card
from loopitr.building.sizes import check_sizes
from loopitr.building.weights import hub_access
from loopitr.checks import usable_device
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor

INSIDE_A_RUN = (".", "best", "model")
CLASSES: dict[str, type[LoopITRModel] | type[DualEncoder]] = {
    model.config_class.model_type: model for model in (LoopITRModel, DualEncoder)
}


@dataclass(frozen=True)
class Saved:
    """A model in eval mode and its processor; `source` is the folder or hub id they came from."""

    model: LoopITRModel | DualEncoder
    processor: LoopITRProcessor
    source: str


class Loaded(NamedTuple):
    """A model in eval mode and its processor."""

    model: LoopITRModel | DualEncoder
    processor: LoopITRProcessor


def model_source(path: str | Path) -> str:
    """The folder that holds the model of a run folder (itself, `best/` or `model/`); a hub id stays as it is.

    Raises:
        OSError: no such folder, or no model in it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        for name in INSIDE_A_RUN:
            if (folder / name / "config.json").is_file():
                return str(folder / name)
        raise OSError(f"{path} holds no model: there is no config.json in it, nor in its best/ or model/")
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) or folder.parent.is_dir():
        raise OSError(f"{path} is not a model folder" if folder.exists() else f"no model folder {path}")
    return str(path)


def load_saved(path: str | Path, *, dtype: torch.dtype | None = None) -> Saved:
    """Load a run, an exported dual encoder, or a hub id.

    Args:
        dtype: of the weights; None: as saved.

    Raises:
        OSError: nothing there, a file missing, or damaged weights; the hub cannot be reached or does not know the id.
        ValueError: a model of another kind, or parts that do not fit each other.
    """
    source = model_source(path)
    with nullcontext() if Path(source).is_dir() else hub_access(source):
        model = saved_class(source, path)[0].from_pretrained(source, dtype="auto" if dtype is None else dtype)
        processor = LoopITRProcessor.from_pretrained(source)
        check_sizes(model, processor, source)
        return Saved(model.eval(), processor, source)


def saved_class(source: str, path: str | Path) -> tuple[type[Any], dict[str, Any]]:
    """The class of the model that is saved in a folder or at a hub id, and its config as it stands there.

    Args:
        path: what an error calls it.

    Raises:
        ValueError: a model of another kind.
    """
    config, _ = PreTrainedConfig.get_config_dict(source)
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"{path} holds a {kind!r} model, wanted {' or '.join(map(repr, CLASSES))}")
    return CLASSES[kind], config


def load(path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Loaded:
    """Load the model and the processor of a run folder, an exported dual encoder, or a hub id.

    Args:
        device: where the model goes; None: the CPU.
        dtype: of the weights; None: as saved.

    Returns:
        The model, in eval mode, and the processor; `model, processor = load(...)`.

    Raises:
        OSError: nothing there, or damaged weights; the hub cannot be reached or does not know the id.
        ValueError: a model of another kind, or a device that torch does not know or this machine does not have.

    Example:
        >>> import tempfile
        >>> from loopitr import build_model, load
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:  # in the place of a run
        ...     for part in build_model(options, vocabulary=["a", "dog"]):
        ...         _ = part.save_pretrained(folder)
        ...     model, processor = load(folder)
        >>> model.get_text_features(**processor(text=["a dog"])).shape
        torch.Size([1, 256])
    """
    where = None if device is None else usable_device(device)  # A bad device is named before weights are read.
    saved = load_saved(path, dtype=dtype)
    model: Any = saved.model
    return Loaded(model if where is None else model.to(where), saved.processor)


def check_output(output: str | Path, kind: str) -> Path:
    """The folder to write to; a model of another kind, a run above all, is not written over.

    Args:
        kind: `model_type` of what is to be written; an earlier one of that kind may be written over.

    Raises:
        OSError: a file.
        ValueError: a folder with a model of another kind.
    """
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{output} is not a folder")
    config = folder / "config.json"
    if config.is_file():
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        if model_type != kind:
            raise ValueError(
                f"{output} holds a {model_type!r} model, which would be overwritten; choose another folder"
            )
    return folder


def load_model(path: str) -> LoopITRModel:
    """A saved model with its fusion head, in float32.

    Raises:
        OSError: no such folder or hub id.
        ValueError: it holds a dual encoder alone.
    """
    saved = load_saved(path, dtype=torch.float32)
    if not isinstance(saved.model, LoopITRModel):
        raise ValueError(f"{path} holds a dual encoder alone: there is no fusion head in it")
    return saved.model


def save_for_use(
    model: LoopITRModel, processor: LoopITRProcessor, folder: str | Path, *, keep_mlm_head: bool = False
) -> None:
    """Save a model with its processor and its card, without the head that only training needs (unless asked for)."""
    head, kept = model.mlm_head, keep_mlm_head or model.mlm_head is None
    try:
        if not kept:
            model.mlm_head, model.config.mlm_head = None, False
        model.save_pretrained(folder)
    finally:
        model.mlm_head, model.config.mlm_head = head, head is not None
    processor.save_pretrained(folder)
    write_card(folder, model)

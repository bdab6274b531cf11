"""Finds, loads and saves models with their processors."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loopitr.building.card import write_card
from loopitr.building.sizes import check_sizes
from loopitr.building.weights import hub_access
from loopitr.checks import usable_device
from loopitr.lineage import INSIDE_A_RUN
from loopitr.models.foreign import config_of
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor
from loopitr.reading import read_object, user_path

CLASSES: dict[str, type[LoopITRModel] | type[DualEncoder]] = {
    model.config_class.model_type: model for model in (LoopITRModel, DualEncoder)
}


@dataclass(frozen=True)
class Saved:
    """A model in eval mode and its processor; `source` is the folder or hub id they were loaded from."""

    model: LoopITRModel | DualEncoder
    processor: LoopITRProcessor
    source: str


class Loaded(NamedTuple):
    """A model in eval mode and its processor."""

    model: LoopITRModel | DualEncoder
    processor: LoopITRProcessor


def model_source(path: str | Path) -> str:
    """The model folder of a run folder (itself, its `best/` or its `model/`); a hub id is returned as it is.

    Raises:
        OSError: there is no such folder, or no model in it.
    """
    folder = user_path(path)
    if folder.is_dir():
        for name in (".", *INSIDE_A_RUN):
            if (folder / name / "config.json").is_file():
                return str(folder / name)
        raise OSError(f"{path} holds no model: there is no config.json in it, nor in its best/ or model/")
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) or folder.parent.is_dir():
        raise OSError(f"{path} is not a model folder" if folder.exists() else f"no model folder {path}")
    return str(path)


def load_saved(path: str | Path, *, dtype: torch.dtype | None = None) -> Saved:
    """Load a run, an exported dual encoder, or a hub id.

    Args:
        dtype: the type of the weights; None: as saved.

    Raises:
        OSError: there is no model, a file is missing or damaged, or the hub cannot be reached or does not know the id.
        ValueError: the model is of another kind, or model and processor do not fit each other.
    """
    source = model_source(path)
    with nullcontext() if Path(source).is_dir() else hub_access(source):
        model = saved_class(source, path)[0].from_pretrained(source, dtype="auto" if dtype is None else dtype)
        processor = LoopITRProcessor.from_pretrained(source)
        check_sizes(model, processor, source)
        return Saved(model.eval(), processor, source)


def saved_class(source: str, path: str | Path) -> tuple[type[Any], dict[str, Any]]:
    """The class of the model that is saved in a folder or at a hub id, and the content of its config.json.

    Args:
        path: the name of the model in errors.

    Raises:
        ValueError: the model is of another kind.
    """
    config = config_of(source)
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"{path} holds a {kind!r} model, wanted {' or '.join(map(repr, CLASSES))}")
    return CLASSES[kind], config


def load(path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Loaded:
    """Load the model and the processor of a run folder, an exported dual encoder, or a hub id.

    Args:
        device: the device of the model; None: the CPU.
        dtype: the type of the weights; None: as saved.

    Returns:
        The model, in eval mode, and the processor: `model, processor = load(...)`.

    Raises:
        OSError: there is no model, a file is missing or damaged, or the hub cannot be reached or does not know the id.
        ValueError: the model is of another kind, or the device cannot be used.

    Example:
        >>> import tempfile
        >>> from loopitr import build_model, load
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:  # This takes the place of a run folder.
        ...     for part in build_model(options, vocabulary=["a", "dog"]):
        ...         _ = part.save_pretrained(folder)
        ...     model, processor = load(folder)
        >>> model.get_text_features(**processor(text=["a dog"])).shape
        torch.Size([1, 256])
    """
    checked_device = None if device is None else usable_device(device)  # It is checked before weights are read.
    saved = load_saved(path, dtype=dtype)
    model: Any = saved.model
    return Loaded(model if checked_device is None else model.to(checked_device), saved.processor)


def output_folder(output: str | Path) -> Path:
    """The folder to write to, which need not exist yet.

    Raises:
        OSError: `output` is a file.
        ValueError: it has no name.
    """
    if not str(output).strip():  # It would be taken for the current folder.
        raise ValueError("the output has no name: give a folder")
    folder = user_path(output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{output} is not a folder")
    return folder


def check_output(output: str | Path, kind: str) -> Path:
    """The folder to write an export to, after checking that it would not overwrite another model, such as a run.

    Args:
        kind: the `model_type` of the export; it may overwrite an earlier model of this type.

    Raises:
        OSError: `output` is a file.
        ValueError: the folder holds a model of another type, or a run with its model in a subfolder, or has no name.
    """
    folder = output_folder(output)
    config = folder / "config.json"
    for name in () if config.is_file() else INSIDE_A_RUN:
        if (folder / name / "config.json").is_file():  # The export would be loaded in the place of this model.
            raise ValueError(f"{output} is the folder of a run, with its model in {name}/; choose another folder")
    if config.is_file():
        model_type = read_object(config).get("model_type")
        if model_type != kind:
            raise ValueError(
                f"{output} holds a {model_type!r} model, which would be overwritten; choose another folder"
            )
    return folder


def save_for_use(
    model: LoopITRModel, processor: LoopITRProcessor, folder: str | Path, *, keep_mlm_head: bool = False
) -> None:
    """Save a model with its processor and its card; `keep_mlm_head`: with the MLM head, which only training needs."""
    head = model.mlm_head
    try:
        if not keep_mlm_head:
            model.mlm_head, model.config.mlm_head = None, False
        model.save_pretrained(folder)
    finally:
        model.mlm_head, model.config.mlm_head = head, head is not None
    processor.save_pretrained(folder)
    write_card(folder, model)

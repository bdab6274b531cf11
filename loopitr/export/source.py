"""The model or tower to export, with its processor and with LoRA adapters merged, and the folder to write to."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loopitr.building.card import DUAL, FUSED
from loopitr.building.folders import load_saved, output_folder
from loopitr.building.towers import load_tower
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor
from loopitr.models.towers import TOWERS, ImageTower, TextTower, tower_config, tower_prefixes

Exportable = LoopITRModel | DualEncoder | ImageTower | TextTower


@dataclass(frozen=True)
class Source:
    """A model in eval mode without adapters, its processor, and its name in errors."""

    model: Exportable
    processor: LoopITRProcessor
    name: str

    @property
    def dual(self) -> DualEncoder | ImageTower | TextTower:
        """The model without its fusion head."""
        return self.model.dual_encoder() if isinstance(self.model, LoopITRModel) else self.model

    @property
    def rankings(self) -> tuple[str, ...]:
        """The rankings of the original run whose results hold for this model too; none for a single tower."""
        if isinstance(self.model, (ImageTower, TextTower)):
            return ()
        return FUSED if isinstance(self.model, LoopITRModel) else DUAL

    @property
    def has_images(self) -> bool:
        """Whether the model embeds images."""
        return not isinstance(self.model, TextTower)

    @property
    def has_texts(self) -> bool:
        """Whether the model embeds texts."""
        return not isinstance(self.model, ImageTower)


def read_source(
    model: LoopITRModel | DualEncoder | str | Path,
    *,
    processor: LoopITRProcessor | None = None,
    tower: str | None = None,
    dtype: torch.dtype | None = None,
) -> Source:
    """The model to export, from a folder or hub id, or in memory.

    Args:
        processor: needed if `model` is not a path.
        tower: `image` or `text`, to export only that tower; from a path, the other's weights are not read.
        dtype: the type of the weights of a model from a path; None: as saved.

    Raises:
        ValueError: the tower is unknown, the model is of another kind, or the processor is missing.
        OSError: there is no such model.
    """
    if tower is not None and tower not in TOWERS:
        raise ValueError(f"tower must be one of {', '.join(TOWERS)}, got {tower!r}")
    exported: Any
    if isinstance(model, (LoopITRModel, DualEncoder)):
        exported, name = model if tower is None else _tower_of(model, tower), "the model"
    elif tower is not None:
        exported, own = load_tower(model, tower, dtype=dtype)
        processor, name = processor or own, str(model)
    else:
        saved = load_saved(model, dtype=dtype)
        exported, processor, name = saved.model, processor or saved.processor, str(model)
    if processor is None:
        raise ValueError(f"{name} needs its processor to be exported with it, got None")
    return Source(exported.merge_lora() if exported.config.lora else exported, processor, name)


def _tower_of(model: LoopITRModel | DualEncoder, tower: str) -> ImageTower | TextTower:
    dual = model.dual_encoder() if isinstance(model, LoopITRModel) else model
    own: Any = TOWERS[tower](tower_config(dual.config, tower))  # type: ignore[arg-type]
    for prefix in tower_prefixes(tower):  # A copy of the modules has buffers that are not saved too.
        name = prefix.removesuffix(".")
        setattr(own, name, copy.deepcopy(getattr(dual, name)))
    return own.eval()


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A context with a temporary folder that is renamed to `output` at the end, or deleted after an error.

    Raises:
        OSError: `output` is a file, or cannot be written to.
        ValueError: `output` is a folder that is not empty, or has no name.
    """
    folder = output_folder(output)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{output} exists and is not empty; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if folder.is_dir():
            folder.rmdir()
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""What is exported: a model or one of its towers, with its processor, LoRA merged; and the folder it goes to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopitr.building.card import DUAL, FUSED
from loopitr.building.folders import load_saved
from loopitr.building.towers import load_tower
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor
from loopitr.models.towers import TOWERS, ImageTower, TextTower, tower_config, tower_prefixes

Exportable = LoopITRModel | DualEncoder | ImageTower | TextTower


@dataclass(frozen=True)
class Source:
    """A model in eval mode without adapters, its processor, and what errors call it."""

    model: Exportable
    processor: LoopITRProcessor
    name: str

    @property
    def dual(self) -> DualEncoder | ImageTower | TextTower:
        """What embeds: the model without its fusion head."""
        return self.model.dual_encoder() if isinstance(self.model, LoopITRModel) else self.model

    @property
    def rankings(self) -> tuple[str, ...]:
        """Which of the figures of the run that it is from are its own, too; a tower alone ranks nothing."""
        if isinstance(self.model, (ImageTower, TextTower)):
            return ()
        return FUSED if isinstance(self.model, LoopITRModel) else DUAL

    @property
    def has_images(self) -> bool:
        return not isinstance(self.model, TextTower)

    @property
    def has_texts(self) -> bool:
        return not isinstance(self.model, ImageTower)


def read_source(
    model: LoopITRModel | DualEncoder | str | Path,
    *,
    processor: LoopITRProcessor | None = None,
    tower: str | None = None,
) -> Source:
    """The model to export, of a folder or hub id, or one in memory.

    Args:
        processor: needed where `model` is not a path.
        tower: `image` or `text`: that one alone; of a path, the other's weights are not read.

    Raises:
        ValueError: an unknown tower, a model of another kind, no processor.
        OSError: no such model.
    """
    if tower is not None and tower not in TOWERS:
        raise ValueError(f"tower must be one of {', '.join(TOWERS)}, got {tower!r}")
    found: Any
    if isinstance(model, (LoopITRModel, DualEncoder)):
        found, name = model if tower is None else _tower_of(model, tower), "the model"
    elif tower is not None:
        found, own = load_tower(model, tower)
        processor, name = processor or own, str(model)
    else:
        saved = load_saved(model)
        found, processor, name = saved.model, processor or saved.processor, str(model)
    if processor is None:
        raise ValueError(f"{name} needs its processor to be exported with it, got None")
    return Source(found.merge_lora() if found.config.lora else found, processor, name)


def _tower_of(model: LoopITRModel | DualEncoder, tower: str) -> ImageTower | TextTower:
    dual = model.dual_encoder() if isinstance(model, LoopITRModel) else model
    own: Any = TOWERS[tower](tower_config(dual.config, tower))  # type: ignore[arg-type]
    weights = {name: value for name, value in dual.state_dict().items() if name.startswith(tower_prefixes(tower))}
    own.load_state_dict(weights)
    return own.to(device=dual.device, dtype=dual.dtype).eval()


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder that is filled aside and gets its name when it is whole; of one that fails, nothing stays.

    Raises:
        OSError: a file, or a place that cannot be written to.
        ValueError: a folder with something in it.
    """
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{output} is not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{output} exists and is not empty; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        if folder.is_dir():
            folder.rmdir()
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

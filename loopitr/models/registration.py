"""The Auto classes of transformers learn of this package's classes when transformers loads them, not before.

`AutoModel.register` and its kin want the classes themselves, and importing those takes seconds: transformers' base
classes import torchvision and accelerate. So `import loopitr` leaves a finder on `sys.meta_path` that lets the others
find the module of an Auto class, and registers our classes right after that module has run.

For this to work our modules must not import `AutoModel` or `AutoProcessor` at their top: they would be registered in
the middle of their own import. `transformers.AutoModel`, where it is used, is as good.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_configs() -> None:
    """Make `AutoConfig` know the configs."""
    from transformers import AutoConfig

    from loopitr.models.config import DualEncoderConfig, ImageTowerConfig, LoopITRConfig, TextTowerConfig

    for config in (DualEncoderConfig, LoopITRConfig, ImageTowerConfig, TextTowerConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_models() -> None:
    """Make `AutoModel` know the models."""
    from transformers import AutoModel

    from loopitr.models.dual_encoder import DualEncoder
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.models.towers import ImageTower, TextTower

    for model in (DualEncoder, LoopITRModel, ImageTower, TextTower):
        AutoModel.register(model.config_class, model, exist_ok=True)


def register_processor() -> None:
    """Make `AutoProcessor` know the processor of both models."""
    from transformers import AutoProcessor

    from loopitr.models.config import DualEncoderConfig, LoopITRConfig
    from loopitr.models.processing import LoopITRProcessor

    for config in (DualEncoderConfig, LoopITRConfig):
        AutoProcessor.register(config, LoopITRProcessor, exist_ok=True)


# The keys are the modules that define the Auto classes.
REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_models,
    "transformers.models.auto.processing_auto": register_processor,
}


def register_when_loaded() -> None:
    """Register with the Auto classes that are loaded already now, with the others as soon as they are."""
    waiting = {name: register for name, register in REGISTRATIONS.items() if name not in sys.modules}
    sys.meta_path.insert(0, _RegisteringFinder(waiting))
    for name, register in REGISTRATIONS.items():
        if name not in waiting:
            register()


class _RegisteringFinder(MetaPathFinder):
    """Finds nothing by itself; a module in `waiting` that the other finders find calls its function once it has run."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # The entry is removed, because the search below asks this finder again.
        register = self.waiting.pop(fullname, None)
        if register is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register()

        loader.exec_module = exec_module
        return spec

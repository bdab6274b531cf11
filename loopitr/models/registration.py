"""Registers this package's classes with transformers' Auto classes when these are first imported.

`AutoModel.register` needs the classes themselves, and importing those takes seconds, since transformers' base classes
import torchvision and accelerate. So `import loopitr` only puts a finder on `sys.meta_path`. When the module of an Auto
class is imported, the finder registers this package's classes right after that module has run.

For this reason no module in `models/` may import `AutoModel` or `AutoProcessor` at its top: it would be registered in
the middle of its own import. Use `transformers.AutoModel` inside a function instead.
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
    """Register the configs with `AutoConfig`."""
    from transformers import AutoConfig

    from loopitr.models.config import DualEncoderConfig, ImageTowerConfig, LoopITRConfig, TextTowerConfig

    for config in (DualEncoderConfig, LoopITRConfig, ImageTowerConfig, TextTowerConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_models() -> None:
    """Register the models with `AutoModel`."""
    from transformers import AutoModel

    from loopitr.models.dual_encoder import DualEncoder
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.models.towers import ImageTower, TextTower

    for model in (DualEncoder, LoopITRModel, ImageTower, TextTower):
        AutoModel.register(model.config_class, model, exist_ok=True)


def register_processor() -> None:
    """Register the processor with `AutoProcessor`."""
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
    """Register now with the Auto classes that are already imported, and with the others when they are."""
    waiting = {name: register for name, register in REGISTRATIONS.items() if name not in sys.modules}
    sys.meta_path.insert(0, _RegisteringFinder(waiting))
    for name, register in REGISTRATIONS.items():
        if name not in waiting:
            register()


class _RegisteringFinder(MetaPathFinder):
    """Lets the other finders find a module in `waiting`, and calls the function for it after the module has run."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # The entry is removed because the search below asks this finder again.
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

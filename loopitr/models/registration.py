"""The Auto classes of transformers learn of this package's classes when transformers loads them, not before.

`AutoConfig.register` and its kin want the classes themselves, and importing those takes seconds: transformers' base
classes import torchvision and accelerate. So `import loopitr` leaves a finder on `sys.meta_path` that lets the others
find the module of an Auto class, and imports ours right after it. Ours register themselves at their end.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FOLLOWERS = {  # module of an Auto class -> the module that registers our classes with it
    "transformers.models.auto.configuration_auto": "loopitr.models.config",
    "transformers.models.auto.modeling_auto": "loopitr.models.loop_model",
    "transformers.models.auto.processing_auto": "loopitr.models.processing",
}


def register_when_loaded() -> None:
    """Register with the Auto classes that are loaded already now, with the others as soon as they are."""
    waiting = {leader: follower for leader, follower in FOLLOWERS.items() if leader not in sys.modules}
    sys.meta_path.insert(0, _FollowingFinder(waiting))
    for leader, follower in FOLLOWERS.items():
        if leader not in waiting:
            importlib.import_module(follower)


class _FollowingFinder(MetaPathFinder):
    """Finds nothing by itself; what the other finders find for a leader imports its follower once it has run."""

    def __init__(self, followers: dict[str, str]) -> None:
        self.followers = followers

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        follower = self.followers.pop(fullname, None)  # the others are asked without this one
        if follower is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(follower)  # in the middle of its own import it goes on to register by itself

        loader.exec_module = exec_module
        return spec

"""The runs that a saved model comes from: its own, the one whose model that run started from, and so on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopitr.reading import read_yaml, user_path

CONFIG, EARLIER = "config.yaml", "config.before-*.yaml"
INSIDE_A_RUN = ("best", "model")
MAX_RUNS = 8  # the length to which a chain of runs that started from each other is followed


@dataclass(frozen=True, kw_only=True)
class StoredConfig:
    """A config file of a run; if it cannot be read, `error` says why and `content` is empty."""

    path: Path
    content: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    def group(self, name: str) -> Mapping[str, Any]:
        """A group of options, such as `model`; empty if the file has none."""
        group = self.content.get(name)
        return group if isinstance(group, dict) else {}


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """A run that a model comes from.

    Attributes:
        name: the model or run folder, as it was named; of the last run also a hub id, or a folder that is gone.
        folder: the run folder.
        configs: `config.yaml`, then the options with which the run began if it was resumed with others, the latest
            first; empty for a model that was not made by a run on this machine.
        start: the saved model (`model.init`) that the run started from; None: it did not start from one.
    """

    name: str
    folder: Path
    configs: tuple[StoredConfig, ...]
    start: str | None

    @property
    def config(self) -> StoredConfig:
        """The run's `config.yaml`, without content if there is none."""
        return self.configs[0] if self.configs else StoredConfig(path=self.folder / CONFIG)


def runs_of(model: str | Path) -> list[PastRun]:
    """The run that made a model, then the run whose model that one started from, and so on, at most `MAX_RUNS`.

    Args:
        model: a run folder, the `best/` or `model/` in it, or a hub id.
    """
    runs: list[PastRun] = []
    name: str | None = str(model)
    while name is not None and len(runs) < MAX_RUNS:
        folder = run_folder(name)
        configs: tuple[StoredConfig, ...] = ()
        if (folder / CONFIG).is_file():
            configs = tuple(map(_read, (folder / CONFIG, *sorted(folder.glob(EARLIER), reverse=True))))
        starts = [init for config in configs if (init := config.group("model").get("init"))]
        # A run that was resumed with other options started from what its first options name.
        runs.append(PastRun(name=name, folder=folder, configs=configs, start=str(starts[-1]) if starts else None))
        name = located(str(starts[-1]), folder) if starts else None
    return runs


def run_folder(model: str | Path) -> Path:
    """The folder of the run of a model folder, or the folder itself if it is no `best/` or `model/` of a run."""
    folder = user_path(model)
    return folder.parent if folder.name in INSIDE_A_RUN and not (folder / CONFIG).is_file() else folder


def located(path: str, folder: Path) -> str:
    """A path of a run's config, relative to the current folder or the nearest parent of the run folder that has it.

    Such paths start at the folder in which the run was started, which is not recorded.
    """
    for start in (Path(), *folder.resolve().parents):
        candidate = start / user_path(path)
        if candidate.exists():
            return str(candidate)
    return path


def _read(path: Path) -> StoredConfig:
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        return StoredConfig(path=path, error=str(error))
    if not isinstance(content, dict):
        return StoredConfig(path=path, error="it holds no options")
    return StoredConfig(path=path, content=content)

"""The runs that a saved model comes from: its own, the one whose model that run started from, and so on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopitr.reading import read_json, read_yaml, user_path

CONFIG, EARLIER = "config.yaml", "config.before-*.yaml"
DESCRIPTION = "data.json"  # In a run folder, its "start" is the `stamp` of the run that it started from.
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
        missing: why there are no configs.
    """

    name: str
    folder: Path
    configs: tuple[StoredConfig, ...]
    start: str | None
    missing: str = f"it has no {CONFIG}"

    @property
    def config(self) -> StoredConfig:
        """The run's `config.yaml`, without content if there is none."""
        return self.configs[0] if self.configs else StoredConfig(path=self.folder / CONFIG)


def runs_of(model: str | Path) -> list[PastRun]:
    """The run that made a model, then the run whose model that one started from, and so on, at most `MAX_RUNS`.

    A run that another one has moved aside since (`NAME.1`) is found there.

    Args:
        model: a run folder, the `best/` or `model/` in it, or a hub id.
    """
    name, folder = str(model), run_folder(model)
    configs = _configs(folder)
    runs: list[PastRun] = []
    while True:
        starts = [init for config in configs if (init := config.group("model").get("init"))]
        # A run that was resumed with other options started from what its first options name.
        start = str(starts[-1]) if starts else None
        runs.append(PastRun(name=name, folder=folder, configs=configs, start=start))
        if start is None or len(runs) == MAX_RUNS:
            return runs
        name, after = located(start, folder), folder
        folder = run_folder(name)
        configs = _configs(folder)
        mark = start_mark(after)
        if configs and not _is_start(configs, mark, is_itself=_is_same(folder, after)):
            folder = _moved_aside(folder, mark) or folder
            configs = _configs(folder) if folder != run_folder(name) else ()
            if not configs:
                missing = "another run has taken its place"
                return [*runs, PastRun(name=name, folder=folder, configs=(), start=None, missing=missing)]


def stamp(model: str | Path) -> str | None:
    """A digest by which to know the run of a saved model again: of its data options and start; None: it has none."""
    config = _configs(run_folder(model))[:1]
    return _digest(config[0]) if config else None


def _configs(folder: Path) -> tuple[StoredConfig, ...]:
    if not (folder / CONFIG).is_file():
        return ()
    return tuple(map(_read, (folder / CONFIG, *sorted(folder.glob(EARLIER), reverse=True))))


def _digest(config: StoredConfig) -> str:
    # Options that are unset may be newer than the file.
    data = {name: value for name, value in config.group("data").items() if value is not None}
    text = json.dumps([data, config.group("model").get("init")], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def start_mark(folder: Path) -> str | None:
    """The stamp of the run that the run in `folder` started from; None: it is older than stamps."""
    try:
        mark = read_json(folder / DESCRIPTION)["start"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return mark if isinstance(mark, str) else None


def _is_start(configs: tuple[StoredConfig, ...], mark: str | None, *, is_itself: bool) -> bool:
    return not is_itself if mark is None else any(_digest(config) == mark for config in configs)


def _is_same(folder: Path, other: Path) -> bool:
    return folder.resolve() == other.resolve()


def _moved_aside(folder: Path, mark: str | None) -> Path | None:
    """The latest of `NAME.1`, `NAME.2`, ... that is the run with that stamp."""
    number, found = 1, None
    while mark is not None and (aside := folder.with_name(f"{folder.name}.{number}")).is_dir():
        found = aside if _is_start(_configs(aside), mark, is_itself=False) else found
        number += 1
    return found


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

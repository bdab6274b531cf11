"""The data that a saved model was trained on, from the `config.yaml` of its run and of the runs before it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from loopitr.lineage import DESCRIPTION, StoredConfig, located, runs_of
from loopitr.reading import read_json

from .description import describe_records, difference
from .hub import from_cache_alone
from .hub_stream import HubStream
from .options import DataOptions
from .overlap import SharedImage, listed, shared_images
from .records import DataError, Record
from .scenes import SceneRecords
from .sources import load_records


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The data options of a run; if `data` is None, they are unknown and `reason` says why.

    `described` is what `describe_records` made of the training records; None: the run is older, or had a stream.
    """

    data: DataOptions | None
    reason: str | None = None
    described: Any = None


@dataclass(frozen=True, kw_only=True)
class TrainingOverlap:
    """The evaluated images that the model was trained on.

    Attributes:
        shared: these images.
        count: the number of evaluated images.
        unknown: why there may be more of them; None: there are no more.
    """

    shared: Sequence[SharedImage]
    count: int
    unknown: str | None

    def line(self) -> str:
        """The result in one line, for a log."""
        if self.shared:
            names = listed(image.name for image in self.shared)
            text = f"warning: {len(self.shared)} of the {self.count} images were trained on: {names}"
            return text if self.unknown is None else f"{text}; there may be more: {self.unknown}"
        if self.unknown is not None:
            return f"warning: whether the model was trained on any of these images is unknown: {self.unknown}"
        return f"the model was trained on none of the {self.count} images (files are compared, not pictures)"

    def to_json(self) -> dict[str, Any]:
        """The result for an evaluation's JSON file."""
        return {
            "count": len(self.shared),
            "images": [image.name for image in self.shared],
            "unknown": self.unknown,
        }


def trained_data(model: str | Path) -> list[TrainedOn]:
    """The data of the run that made this model, then of the run whose model that one started from, and so on.

    Relative paths in a `config.yaml` are looked for from the current folder, then from the folders that contain the run
    folder. A run that was resumed with other options has several data.
    """
    history: list[TrainedOn] = []
    for run in runs_of(model):
        history += [_trained_on(config, run.folder) for config in run.configs]
        if not run.configs:
            reason = f"the data of {run.name} are not recorded ({run.missing})"
            history.append(TrainedOn(data=None, reason=reason))
    return history


def training_overlap(records: Sequence[Record], history: Sequence[TrainedOn]) -> TrainingOverlap:
    """Which of the evaluated `records` are among the training images of `history`."""
    shared: dict[int, SharedImage] = {}
    unknown = None
    for run in history:
        try:
            if run.data is None:
                raise DataError(str(run.reason))
            if run.data.streaming:
                raise DataError("it was trained on a stream")
            others = _load(run.data)
            for image in shared_images(records, others):
                shared.setdefault(image.index, image)
            _check_readable(others)
            change = difference(run.described, describe_records(others), others, in_order=False)
            if change is not None:
                raise DataError(f"the training data have changed since ({change})")
        except (DataError, OSError) as error:
            unknown = unknown or str(error)
    return TrainingOverlap(shared=[shared[index] for index in sorted(shared)], count=len(records), unknown=unknown)


def _load(options: DataOptions) -> Sequence[Record]:
    """The training records. Nothing is downloaded, since whoever made the model has chosen the address."""
    files = options.data_files.values() if isinstance(options.data_files, dict) else options.data_files or ()
    for name in (options.hub or "", *([files] if isinstance(files, str) else files)):
        if "://" in name:
            raise DataError(f"its data are at {name}, and nothing is downloaded to compare with")
    with from_cache_alone() if options.hub is not None else nullcontext():
        records = load_records(options, options.split)
    assert not isinstance(records, HubStream)
    return records


def _check_readable(records: Sequence[Record]) -> None:
    """Check that the images still exist.

    Raises:
        DataError: some of the files are missing.
    """
    if isinstance(records, SceneRecords):
        return
    images = (records[index].image for index in range(len(records)))
    missing = [str(image) for image in images if isinstance(image, (str, Path)) and not Path(image).is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(records)} training images are not here: {listed(missing)}")


def _trained_on(config: StoredConfig, folder: Path) -> TrainedOn:
    error = config.error
    if error is None:
        try:
            return TrainedOn(data=_data_options(config.content["data"], folder), described=_described(config.path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
            error = _reason(reason)
    return TrainedOn(data=None, reason=f"{config.path} cannot be read ({error})")


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, (OSError, ValueError)) else type(error).__name__


def _described(config: Path) -> Any:
    """The description of the training data in the file that belongs to `config.yaml`, or to an earlier one."""
    path = config.with_name(config.stem.replace("config", Path(DESCRIPTION).stem, 1) + ".json")
    try:
        return read_json(path)["train"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _data_options(tree: dict[str, Any], folder: Path) -> DataOptions:
    kinds = get_type_hints(DataOptions)
    for name, kind in kinds.items():
        if name in tree and not _fits(tree[name], kind):
            raise ValueError(f"data.{name} is {tree[name]!r}")
    options = DataOptions(**{name: value for name, value in tree.items() if name in kinds})
    if "scenes" not in tree:  # Older runs used the scenes if they named no other source.
        options = replace(options, scenes=True)
    paths: dict[str, Any] = {}
    for name in ("karpathy", "albef", "table", "hub", "images", "val_albef", "val_table"):
        value = getattr(options, name)
        if isinstance(value, str):
            paths[name] = located(value, folder)
        elif isinstance(value, list):
            paths[name] = [located(item, folder) for item in value]
    return replace(options, **paths)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of an option."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, str) for pair in value.items() for item in pair)
    return type(value) is kind or (kind is float and type(value) is int)

"""The data that a saved model was trained on, from the `config.yaml` of its run and of the runs before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from loopitr.lineage import CONFIG, StoredConfig, located, runs_of

from .hub_stream import HubStream
from .options import DataOptions
from .overlap import SharedImage, listed, shared_images
from .records import DataError, Record
from .scenes import SceneRecords
from .sources import load_records


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The data options of a run; if `data` is None, they are unknown and `reason` says why."""

    data: DataOptions | None
    reason: str | None = None


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
        return f"the model was trained on none of the {self.count} images"

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
            reason = f"the data of {run.name} are not recorded (it has no {CONFIG})"
            history.append(TrainedOn(data=None, reason=reason))
    return history


def training_overlap(records: Sequence[Record], history: Sequence[TrainedOn]) -> TrainingOverlap:
    """Which of the evaluated `records` are among the training images of `history`."""
    shared: dict[str, SharedImage] = {}
    unknown = None
    for run in history:
        try:
            if run.data is None:
                raise DataError(str(run.reason))
            if run.data.streaming:
                raise DataError("it was trained on a stream")
            others = load_records(run.data, run.data.split)
            assert not isinstance(others, HubStream)
            _check_readable(others)
            for image in shared_images(records, others):
                shared.setdefault(image.name, image)
        except (DataError, OSError) as error:
            unknown = unknown or str(error)
    return TrainingOverlap(shared=list(shared.values()), count=len(records), unknown=unknown)


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
            return TrainedOn(data=_data_options(config.content["data"], folder))
        except (KeyError, TypeError, AttributeError) as reason:
            error = type(reason).__name__
    return TrainedOn(data=None, reason=f"{config.path} cannot be read ({error})")


def _data_options(tree: dict[str, Any], folder: Path) -> DataOptions:
    known = {field.name for field in fields(DataOptions)}
    options = DataOptions(**{name: value for name, value in tree.items() if name in known})
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

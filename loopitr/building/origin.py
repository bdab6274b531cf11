"""The origin of a saved model, for its card: licence, data, base models and results, from the files of its run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm

from loopitr.building.weights import TEXT_ALIASES
from loopitr.lineage import PastRun, located, runs_of
from loopitr.reading import read_json, read_yaml, user_path

METRICS = "metrics.json"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
UNKNOWN = "unknown"  # in the hub's list of licences
FILES = ("karpathy", "table", "albef")
BUILDERS = ("imagefolder", "parquet", "webdataset", "json", "csv", "arrow")  # values of data.hub that are formats
RANKINGS, DIRECTIONS = ("dual", "match", "match_plus_similarity", "reranked"), ("i2t", "t2i")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model's licence, data, base models and final results.

    Data and models are hub ids, or names of local files without their folders.

    Attributes:
        recalls: ranking -> direction -> k -> percent, at the end of the run.
        gallery: the size of the evaluated gallery, as text.
        gain: the gain of reranking in points of mean R@1, and its margin.
        similarity_weight: the weight with which `reranked` was measured.
    """

    license: str = UNKNOWN
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    steps: int | None = None
    evaluated_on: str = "held-out data"
    split: str = ""
    gallery: str = ""
    candidates: int = 0
    recalls: Mapping[str, Mapping[str, Mapping[int, float]]] = field(default_factory=dict)
    gain: tuple[float, float] | None = None
    similarity_weight: float | None = None

    def starting_from(self, hub_id: str) -> Origin:
        """A copy with `hub_id` as base model; a local path is not named."""
        return replace(self, base_models=(hub_id,)) if _is_hub_id(hub_id) else self


def origin_of(source: str | Path) -> Origin:
    """The origin of the model of a run folder, as far as its files say; for a hub id, that id is the base model."""
    if not user_path(source).is_dir():
        return Origin().starting_from(str(source))
    run, *before = runs_of(source)
    bases = tuple(dict.fromkeys(_base_models(before[-1] if before else run)))
    datasets = tuple(dict.fromkeys(_datasets(run.config.group("data"))))
    licence = run.config.group("train").get("license")
    if not isinstance(licence, str):
        # A model trained from scratch on the built-in data has the licence of this package.
        from_scratch = datasets == ("scenes",) and not bases and not run.start
        licence = "apache-2.0" if from_scratch else UNKNOWN
    origin = Origin(license=licence, base_models=bases, datasets=datasets)
    return _with_metrics(origin, read_object(run.folder / METRICS))


def _with_metrics(origin: Origin, metrics: Mapping[str, Any]) -> Origin:
    try:
        recalls = {ranking: _by_k(metrics[ranking]) for ranking in RANKINGS if metrics.get(ranking)}
        if not recalls:
            return origin
        for dim, ranking in metrics.get("shortened", {}).items():
            recalls[f"dual_first_{int(dim)}"] = _by_k(ranking)
        gain, weight = metrics.get("reranking_gain"), metrics.get("similarity_weight")
        return replace(
            origin,
            steps=metrics["training"]["steps"],
            evaluated_on=origin.datasets[0] if origin.datasets else Origin.evaluated_on,
            split=str(metrics["split"]),
            gallery=f"{metrics['num_images']} images, {metrics['num_captions']} captions",
            candidates=int(metrics["k"]),
            recalls=recalls,
            similarity_weight=None if weight is None else float(weight),
            gain=(float(gain["points"]), float(gain["margin"])) if gain else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return origin


def _by_k(ranking: Mapping[str, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    return {
        side: {int(name.removeprefix("r")): float(value) for name, value in ranking[side].items()}
        for side in DIRECTIONS
    }


def read_object(path: Path) -> Mapping[str, Any]:
    """The object in a JSON or YAML file; empty if the file is missing or damaged."""
    try:
        content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _group(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = options.get(name)
    return group if isinstance(group, dict) else {}


def _datasets(data: Mapping[str, Any]) -> list[str]:
    hub = data.get("hub")
    if isinstance(hub, str):
        named = hub not in BUILDERS and not user_path(hub).exists() and _is_hub_id(hub)
        return [hub] if named else [Path(hub).name]
    names = []
    for source in FILES:
        given = data.get(source) or []
        names += [Path(str(file)).stem for file in ([given] if isinstance(given, str) else given)]
    return names or (["scenes"] if data.get("scenes") else [])


def _base_models(first: PastRun) -> list[str]:
    """The hub ids of the weights that the first run of a model's history started from."""
    if first.start is not None:
        return []  # There are more runs than are followed.
    if not first.configs:
        return [first.name] if _is_hub_id(first.name) else []
    model = first.config.group("model")
    if pair := model.get("pair"):
        return [str(pair)] if _is_hub_id(located(str(pair), first.folder)) else []
    vision, text, bases = _group(model, "vision"), _group(model, "text"), []
    if vision.get("pretrained") and not vision.get("checkpoint"):
        bases.append(_timm_id(str(vision.get("name"))))
    if text.get("pretrained") and not user_path(str(text.get("name"))).is_dir():
        name = str(text.get("name"))
        bases.append(TEXT_ALIASES.get(name, name))
    return [base for base in bases if _is_hub_id(base)]


def _timm_id(name: str) -> str:
    config = timm.get_pretrained_cfg(name.removeprefix("hf-hub:"), allow_unregistered=True)
    hub_id = getattr(config, "hf_hub_id", None) or name.removeprefix("hf-hub:")
    return hub_id if not hub_id.endswith("/") else f"{hub_id}{name}"


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not user_path(name).exists()

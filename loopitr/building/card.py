"""The model card of a saved model: a README.md with the hub's metadata, an example of use, and results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from loopitr.building.card_file import CARD, may_write, save_card
from loopitr.building.licences import licence_fields
from loopitr.building.origin import HUB_ID, Origin, origin_of, read_object
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.scoring import DUAL_ALONE

# The names of rankings in `metrics.json`, and in the card.
RANKINGS = {
    "dual": "dual encoder",
    "match": "match score",
    "match_plus_similarity": "match score + similarity",
    "reranked": "reranked",
}
DUAL, FUSED = ("dual",), ("dual", "match", "reranked")  # prefixes of the names of rankings that a card shows
SHORTENED = "dual_first_"  # prefix of a ranking by shortened embeds, before the number of dimensions
DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
Recalls = Mapping[str, Mapping[str, Mapping[int, float]]]  # ranking -> direction -> k -> percent
USE = """\
from loopitr import Retriever

retriever = Retriever.from_pretrained({name})
images = retriever.encode_images(["beach.jpg", "forest.jpg"])  # [2, {width}], unit length
texts = retriever.encode_texts(["a dog on a beach"])
print(retriever.similarity(texts, images))
print(retriever.rank("a dog on a beach", ["beach.jpg", "forest.jpg"]))  # best first{how}
"""


def write_card(
    folder: str | Path,
    model: LoopITRModel | DualEncoder,
    *,
    source: str | Path | None = None,
    name: str | None = None,
    base_model: str | None = None,
) -> bool:
    """Write `README.md` into `folder`, unless it has one that a user wrote or changed.

    Args:
        source: the run folder that the model comes from, whose `config.yaml` and `metrics.json` have its training data
            and results, or a hub id; None: `folder` itself.
        name: the name that the example of use loads; None: the folder's own name.
        base_model: a hub id that the model was made from, if `source` does not say so.

    Returns:
        Whether it was written.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(folder) / CARD
    if not may_write(path):
        return False
    origin = origin_of(folder if source is None else source)
    if base_model is not None:
        origin = origin.starting_from(base_model)
    title, fused = name or Path(folder).resolve().name, isinstance(model, LoopITRModel)
    heads = ["dual-encoder", "cross-encoder"] if fused else ["dual-encoder"]
    body = f"{_what_it_is(model, _weight(Path(folder), model))}\n\n## Use\n\n{_use(model, title)}"
    save_card(path, _card(title, body, origin, rankings=FUSED if fused else DUAL, tags=heads))
    return True


def write_export_card(
    folder: Path,
    body: str,
    *,
    title: str,
    source: str | Path,
    rankings: tuple[str, ...] = (),
    tags: Sequence[str] = (),
    library: str = "loopitr",
    pipeline: str = "feature-extraction",
) -> bool:
    """Write the card of an export: its own `body`, with the licence, origin and results of the exported model.

    Args:
        title: the model's name, and the heading.
        source: the run folder or hub id of the exported model; for anything else, its origin is unknown.
        rankings: the rankings whose results hold for the export too: `DUAL`, `FUSED` or none.

    Returns:
        Whether it was written; a README.md that a user wrote or changed stays.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = folder / CARD
    if not may_write(path):
        return False
    options = {"library": library, "pipeline": pipeline}
    save_card(path, _card(title, body.strip(), origin_of(source), rankings=rankings, tags=tags, **options))
    return True


def _card(
    name: str,
    body: str,
    origin: Origin,
    *,
    rankings: tuple[str, ...],
    tags: Sequence[str],
    library: str = "loopitr",
    pipeline: str = "feature-extraction",
) -> str:
    """The text of a card; the heading for `OWNER/NAME` is NAME."""
    title = " ".join(name.rpartition("/")[2].split())
    recalls = {ranking: values for ranking, values in origin.recalls.items() if ranking.startswith(rankings)}
    results = _eval_results(recalls, origin)
    data = ModelCardData(
        **licence_fields(origin.license),
        library_name=library,
        pipeline_tag=pipeline,
        tags=[*dict.fromkeys(["loopitr", "image-text-retrieval", *tags])],
        base_model=list(origin.base_models) or None,
        # The hub refuses other names; the text has all.
        datasets=[name for name in origin.datasets if HUB_ID.fullmatch(name)] or None,
        metrics=["recall"] if results else None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    parts = [f"# {title}", body]
    if recalls:
        parts += ["## Results", _results(recalls, origin)]
    trained = _training(origin)
    if trained:
        parts += ["## Training", trained]
    text = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _eval_results(recalls: Recalls, origin: Origin) -> list[EvalResult]:
    """The recalls of the dual encoder and of reranking, in percent, for the hub's `model-index`."""
    return [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=origin.evaluated_on,
            dataset_name=origin.evaluated_on,
            dataset_split=origin.split,
            metric_type=f"{ranking}_{direction}_recall@{k}",
            metric_name=f"R@{k} {DIRECTIONS[direction]}, {RANKINGS[ranking]} (percent)",
            metric_value=round(value, 2),
        )
        for ranking, sides in recalls.items()
        if ranking in ("dual", "reranked")
        for direction, values in sides.items()
        for k, value in values.items()
    ]


def _label(ranking: str, origin: Origin) -> str:
    if ranking.startswith(SHORTENED):
        return f"{RANKINGS['dual']}, first {ranking.removeprefix(SHORTENED)} dimensions"
    if ranking == "reranked" and origin.similarity_weight is not None:
        return f"reranked (w = {origin.similarity_weight:.4g})"
    return RANKINGS[ranking]


def _weight(folder: Path, model: LoopITRModel | DualEncoder) -> float:
    """The similarity weight as saved, since the model in memory may be of another step of the run."""
    saved = read_object(folder / "config.json").get("similarity_weight")
    return float(saved if isinstance(saved, (int, float)) else getattr(model.config, "similarity_weight", 0.0))


def _what_it_is(model: LoopITRModel | DualEncoder, weight: float) -> str:
    config = model.config
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("mlm_head.")) / 1e6
    size = config.vision["image_size"]
    towers = (
        f"images ({config.vision['name']}, {size} x {size} pixels) and captions ({config.text['model_type']}) become "
        f"unit vectors of {config.embed_dim} dimensions, whose dot product is the similarity"
    )
    if not isinstance(model, LoopITRModel):
        return (
            f"The dual encoder of a `loopitr` model, {count:.1f}M parameters: {towers}. It does not include the fusion "
            "head that it was trained with."
        )
    score = "match score + w x similarity / temperature"
    calibrated = (
        f"the similarity weight w is so high that the dual encoder alone decides (w = {weight:g})"
        if weight >= DUAL_ALONE
        else f"with the similarity weight w = {weight:.4g} of `config.json`"
    )
    return (
        f"A `loopitr` model for image-text retrieval, {count:.1f}M parameters: a dual and a cross encoder in one "
        f"network. Dual encoder: {towers}. Cross encoder: a fusion head that reads a caption and an image's tokens "
        f"together scores a pair. The best candidates of the one are reranked by {score}, {calibrated}."
    )


def _use(model: LoopITRModel | DualEncoder, name: str) -> str:
    how = ", by both heads" if isinstance(model, LoopITRModel) else ""
    quoted = json.dumps(name, ensure_ascii=False)  # also a literal of Python
    lines = USE.format(name=quoted, width=model.config.embed_dim, how=how)
    return f"```python\n{lines.rstrip()}\n```"


def _results(recalls: Recalls, origin: Origin) -> str:
    ks = sorted({k for sides in recalls.values() for values in sides.values() for k in values})
    header = ["", *(f"{DIRECTIONS[side]} R@{k}" for side in DIRECTIONS for k in ks)]
    lines = [header, ["---", *("---:" for _ in header[1:])]]
    for ranking, sides in recalls.items():
        values = [sides.get(side, {}).get(k) for side in DIRECTIONS for k in ks]
        lines.append([_label(ranking, origin), *("" if value is None else f"{value:.1f}" for value in values)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [f"Recall in percent on {origin.evaluated_on}, split {origin.split} ({origin.gallery})."]
    if "reranked" in recalls and origin.gain is not None:
        points, margin = origin.gain
        notes.append(
            f"Reranking {origin.candidates} candidates: {points:+.1f} +- {margin:.1f} points of mean R@1 (95%)."
        )
    return f"{' '.join(notes)}\n\n{table}"


def _training(origin: Origin) -> str:
    lines = []
    if origin.datasets:
        lines.append(f"- data: {', '.join(origin.datasets)}")
    if origin.base_models:
        lines.append(f"- started from: {', '.join(origin.base_models)}")
    if origin.steps is not None:
        lines.append(f"- steps: {origin.steps}")
    return "\n".join(lines)

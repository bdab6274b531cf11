"""The model card of a saved model: a README.md with the hub's metadata, its results, and five lines of use."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from loopitr.building.origin import Origin, origin_of, read_object
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.scoring import DUAL_ALONE

CARD = "README.md"
MARK = "<!-- written by loopitr ({}); a card that is changed by hand is kept -->"
MARKED = re.compile(r"\n<!-- written by loopitr \(([0-9a-f]{16})\)[^\n]*-->\n?\Z")
# What `metrics.json` calls a ranking, and its name here.
RANKINGS = {
    "dual": "dual encoder",
    "match": "match score",
    "match_plus_similarity": "match score + similarity",
    "reranked": "reranked",
}
SHORTENED = "dual_first_"  # dimensions
DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
DUAL_USE = """\
from loopitr import Retriever

retriever = Retriever.from_pretrained("{name}")
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
    use: str | None = None,
    kind: Sequence[str] = (),
    base_model: str | None = None,
) -> bool:
    """Write `README.md` into `folder`, unless one is there that somebody wrote or changed; whether it was written.

    Args:
        source: where the model comes from: its run folder, whose `config.yaml` and `metrics.json` say what it was
            trained on and how good it is, or a hub id; None: `folder` itself.
        name: what the example of use loads; None: the folder's own name.
        use: Python lines in the place of that example.
        kind: more of the hub's tags, such as `onnx`.
        base_model: a hub id that the model was made from, where `source` does not say so.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(folder) / CARD
    if not may_write(path):
        return False
    origin = origin_of(folder if source is None else source)
    if base_model is not None:
        origin = origin.starting_from(base_model)
    title = name or Path(folder).resolve().name
    weight = _weight(Path(folder), model)
    data = _metadata(model, origin, title.rpartition("/")[2], kind)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(model, origin, title, use, weight)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(CARD + ".partial")
    partial.write_text(_marked(str(card)), encoding="utf-8")
    partial.replace(path)
    return True


def may_write(path: Path) -> bool:
    """Whether there is no card, or the one that is there is as `write_card` left it."""
    try:
        return is_own(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return not path.is_symlink()
    except (OSError, UnicodeDecodeError):
        return False


def is_own(card: str) -> bool:
    """Whether a card's text is as `write_card` wrote it."""
    text = card.replace("\r\n", "\n")
    mark = MARKED.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _marked(card: str) -> str:
    text = card.rstrip("\n") + "\n"
    return f"{text}\n{MARK.format(_digest(text))}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _metadata(model: LoopITRModel | DualEncoder, origin: Origin, title: str, kind: Sequence[str]) -> ModelCardData:
    heads = ["dual-encoder", "cross-encoder"] if isinstance(model, LoopITRModel) else ["dual-encoder"]
    results = _eval_results(model, origin)
    return ModelCardData(
        license=origin.license,
        library_name="loopitr",
        pipeline_tag="feature-extraction",
        tags=["loopitr", "image-text-retrieval", *heads, *kind],
        base_model=list(origin.base_models) or None,
        datasets=list(origin.datasets) or None,
        metrics=["recall"] if results else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _eval_results(model: LoopITRModel | DualEncoder, origin: Origin) -> list[EvalResult]:
    """Recalls of the dual encoder and reranked, in percent, in the form of the hub's `model-index`."""
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
        for ranking, recalls in _recalls(model, origin).items()
        if ranking in ("dual", "reranked")
        for direction, values in recalls.items()
        for k, value in values.items()
    ]


def _recalls(model: LoopITRModel | DualEncoder, origin: Origin) -> dict[str, Mapping[str, Mapping[int, float]]]:
    """Of the rankings that this model can give: ranking -> direction -> k -> percent."""
    fused = isinstance(model, LoopITRModel)
    return {ranking: recalls for ranking, recalls in origin.recalls.items() if fused or ranking.startswith("dual")}


def _label(ranking: str, origin: Origin) -> str:
    if ranking.startswith(SHORTENED):
        return f"{RANKINGS['dual']}, first {ranking.removeprefix(SHORTENED)} dimensions"
    if ranking == "reranked" and origin.similarity_weight is not None:
        return f"reranked (w = {origin.similarity_weight:.4g})"
    return RANKINGS[ranking]


def _text(model: LoopITRModel | DualEncoder, origin: Origin, name: str, use: str | None, weight: float) -> str:
    parts = [f"# {name.rpartition('/')[2]}", _what_it_is(model, weight), "## Use", _use(model, name, use)]
    if origin.recalls:
        parts += ["## Results", _results(model, origin)]
    trained = _training(origin)
    if trained:
        parts += ["## Training", trained]
    return "\n\n".join(parts) + "\n"


def _weight(folder: Path, model: LoopITRModel | DualEncoder) -> float:
    """The similarity weight as it is saved: the model in memory may be of another step of the run."""
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
            f"The dual encoder of a `loopitr` model, {count:.1f}M parameters: {towers}. The fusion head that it was "
            "trained with is not in here."
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


def _use(model: LoopITRModel | DualEncoder, name: str, use: str | None) -> str:
    how = ", by both heads" if isinstance(model, LoopITRModel) else ""
    lines = use or DUAL_USE.format(name=name, width=model.config.embed_dim, how=how)
    return f"```python\n{lines.rstrip()}\n```"


def _results(model: LoopITRModel | DualEncoder, origin: Origin) -> str:
    recalls = _recalls(model, origin)
    ks = sorted({k for sides in recalls.values() for values in sides.values() for k in values})
    header = ["", *(f"{DIRECTIONS[side]} R@{k}" for side in DIRECTIONS for k in ks)]
    lines = [header, ["---", *("---:" for _ in header[1:])]]
    for ranking, sides in recalls.items():
        values = [sides.get(side, {}).get(k) for side in DIRECTIONS for k in ks]
        lines.append([_label(ranking, origin), *("" if value is None else f"{value:.1f}" for value in values)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [f"Recall in percent on {origin.evaluated_on}, split {origin.split} ({origin.gallery})."]
    if isinstance(model, LoopITRModel) and origin.gain is not None:
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

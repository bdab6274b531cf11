"""The adapter to mteb, with the real package on small local tasks: its figures are those of plain rankings."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import captions, picture, tiny_processor

from loopitr import Retriever

mteb = pytest.importorskip("mteb", reason="tasks are those of mteb (extra `mteb`)")

from datasets import Dataset  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models.models_protocols import EncoderProtocol, SearchProtocol  # noqa: E402

from loopitr.search.mteb import MtebEncoder, MtebTwoStage  # noqa: E402

COUNT = 12
PICTURES = [picture(i) for i in range(COUNT)]
TEXTS = [captions(i, 1)[0] for i in range(COUNT)]


def local_task(category: str) -> AbsTaskRetrieval:
    """Query i's right answer is document i. `t2i`, `i2t`, `t2t`, or `it2i`, whose queries have a text and an image."""

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Local{category.upper()}",
            description="twelve random pictures",
            dataset={"path": "local/nowhere", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text"] if category == "t2t" else ["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            columns = {"t": {"text": TEXTS}, "i": {"image": PICTURES}, "it": {"text": TEXTS, "image": PICTURES}}
            asked, searched = category.split("2")
            queries = Dataset.from_dict({"id": [f"q{i}" for i in range(COUNT)], **columns[asked]})
            corpus = Dataset.from_dict({"id": [f"d{i}" for i in range(COUNT)], **columns[searched]})
            right = {f"q{i}": {f"d{i}": 1} for i in range(COUNT)}
            split = {"queries": queries, "corpus": corpus, "relevant_docs": right, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Local()


def centre(projection: torch.nn.Linear, encode: Callable[[], Any]) -> None:
    """Take the mean out of its outputs, so that different queries find different things."""
    outputs: list[torch.Tensor] = []
    hook = projection.register_forward_hook(lambda module, given, output: outputs.append(output))
    encode()
    hook.remove()
    with torch.no_grad():
        projection.bias.sub_(torch.cat(outputs).mean(0))


@pytest.fixture(scope="module")
def retriever() -> Retriever:
    model, processor = tiny_model().eval(), tiny_processor()
    centre(model.dual.vision_projection, lambda: Retriever(model, processor).encode_images(PICTURES))
    centre(model.dual.text_projection, lambda: Retriever(model, processor).encode_texts(TEXTS))
    with torch.no_grad():
        model.itm_head.weight.mul_(100)  # This spreads the match scores out.
    model.config.similarity_weight = 0.2
    return Retriever(model, processor)


def run(model: Any, task: Any, **options: Any) -> dict[str, float]:
    """The scores of a task, without mteb's cache of results."""
    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False, **options)
    assert not result.exceptions
    return result.task_results[0].scores["test"][0]


def similarities(retriever: Retriever, category: str) -> torch.Tensor:
    embeds = {"t": retriever.encode_texts(TEXTS), "i": retriever.encode_images(PICTURES)}
    asked, searched = category.split("2")
    return retriever.similarity(embeds[asked], embeds[searched]).double()


def scores_of_pairs(retriever: Retriever, category: str) -> torch.Tensor:
    """Reranking scores [queries, documents]."""
    pairs = [(text, image) for text in TEXTS for image in PICTURES]
    scores = torch.from_numpy(retriever.predict(pairs)).view(COUNT, COUNT)
    return scores if category == "t2i" else scores.T


def recalls(scores: torch.Tensor) -> dict[str, float]:
    place = (scores > scores.diagonal()[:, None]).sum(1)
    return {f"recall_at_{k}": round(float((place < k).double().mean()), 5) for k in (1, 3, 5)}


def assert_recalls(found: dict[str, float], expected: torch.Tensor) -> None:
    assert {name: found[name] for name in recalls(expected)} == recalls(expected)


@pytest.mark.parametrize("category", ["t2i", "i2t"])
def test_the_dual_encoders_figures(retriever, category):
    model = MtebEncoder(retriever)
    assert isinstance(model, EncoderProtocol) and not isinstance(model, SearchProtocol)
    assert_recalls(run(model, local_task(category)), similarities(retriever, category))


@pytest.mark.parametrize("category", ["t2i", "i2t"])
@pytest.mark.parametrize("rerank", [4, 1000])
def test_reranked_figures(retriever, category, rerank, tmp_path):
    model = MtebTwoStage(retriever, rerank=rerank)
    assert isinstance(model, SearchProtocol)
    similarity, scores = similarities(retriever, category), scores_of_pairs(retriever, category)
    first = similarity.topk(min(rerank, COUNT), dim=1).indices
    expected = (similarity - 1000).scatter(1, first, scores.gather(1, first))
    assert (expected.argmax(1) != similarity.argmax(1)).any()
    assert_recalls(run(model, local_task(category), prediction_folder=tmp_path), expected)
    (file,) = tmp_path.rglob("*predictions.json")
    for query, found in json.loads(file.read_text())["default"]["test"].items():
        row, ordered = int(query[1:]), sorted(found, key=found.get, reverse=True)
        assert [int(name[1:]) for name in ordered] == expected[row].argsort(descending=True).tolist()
        for name in ordered[: first.shape[1]]:
            assert found[name] == pytest.approx(float(scores[row, int(name[1:])]), abs=1e-4)


def test_mtebs_own_two_stages_give_the_same(retriever, tmp_path):
    run(MtebEncoder(retriever), local_task("t2i"), prediction_folder=tmp_path)
    task = local_task("t2i").convert_to_reranking(tmp_path, top_k=4)
    found = run(MtebTwoStage(retriever, rerank=2), task)  # The candidates are the task's.
    expected = run(MtebTwoStage(retriever, rerank=4), local_task("t2i"))
    assert found["recall_at_1"] == expected["recall_at_1"] and found["recall_at_3"] == expected["recall_at_3"]


def test_each_image_is_opened_once_for_embeds_and_once_for_all_its_pairs(retriever):
    vision, seen = retriever.model.dual.vision, []
    hook = vision.register_forward_hook(lambda module, given, output: seen.append(len(output)))
    run(MtebTwoStage(retriever, rerank=COUNT), local_task("t2i"))
    hook.remove()
    assert sum(seen) == 2 * COUNT


def test_other_pairs_stay_as_the_dual_encoder_ranks_them(retriever):
    both = run(MtebTwoStage(retriever), local_task("t2t"))
    assert both["recall_at_1"] == run(MtebEncoder(retriever), local_task("t2t"))["recall_at_1"]
    together = retriever.encode_texts(TEXTS) + retriever.encode_images(PICTURES)
    expected = torch.from_numpy(together @ retriever.encode_images(PICTURES).T).double()
    assert_recalls(run(MtebEncoder(retriever), local_task("it2i")), expected)


def test_results_are_kept_under_names_of_their_own(retriever):
    plain, cut, both = MtebEncoder(retriever), MtebEncoder(retriever, truncate_dim=4), MtebTwoStage(retriever, rerank=7)
    names = [model.mteb_model_meta.name for model in (plain, cut, both)]
    assert names == ["loopitr/model", "loopitr/model-4-dimensions", "loopitr/model-reranked-7"]
    assert plain.mteb_model_meta.embed_dim == 16 and cut.mteb_model_meta.embed_dim == 4
    others = [Retriever(tiny_model(seed=1), tiny_processor()), Retriever(retriever.model, tiny_processor(max_length=8))]
    revisions = {model.mteb_model_meta.revision for model in (plain, *map(MtebEncoder, others))}
    assert len(revisions) == 3 and plain.mteb_model_meta.revision == cut.mteb_model_meta.revision
    assert cut.encode([{"text": TEXTS}]).shape == (COUNT, 4) and cut.encode([]).shape == (0, 4)


def test_what_it_cannot_do_is_one_line(retriever, monkeypatch):
    with pytest.raises(ValueError, match="DualEncoder has no fusion head to rerank with: use MtebEncoder"):
        MtebTwoStage(Retriever(retriever.model.dual_encoder(), tiny_processor()))
    with pytest.raises(ValueError, match="rerank must be at least 1, got 0"):
        MtebTwoStage(retriever, rerank=0)
    with pytest.raises(ValueError, match="a batch without text and image, of audio"):
        MtebEncoder(retriever).encode([{"audio": [1]}])
    with pytest.raises(ValueError, match="precision must be float32 in mteb's tasks, got 'int8'"):
        MtebEncoder(retriever).encode([], precision="int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "loopitr\[mteb\]"'):
        MtebEncoder(retriever)

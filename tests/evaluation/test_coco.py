"""ECCV Caption and CxC with the real package: on its own ground truth, and through an evaluation of a small one."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import captions, jpeg, tiny_processor

eccv_caption = pytest.importorskip("eccv_caption", reason="its ground truth is of eccv-caption (extra `eccv`)")

from loopitr.commands.evaluate import EvaluateOptions, evaluate  # noqa: E402
from loopitr.data import DataError, DataOptions  # noqa: E402
from loopitr.data.coco_ids import CocoImage, coco_images  # noqa: E402
from loopitr.evaluation.coco import CocoBenchmarks, _load_metrics  # noqa: E402
from loopitr.evaluation.gallery import Gallery  # noqa: E402
from loopitr.evaluation.nearest import Nearest  # noqa: E402
from loopitr.evaluation.ranking import Ranking, mean_average_precision_at_r  # noqa: E402
from loopitr.evaluation.reranking import CandidateScores  # noqa: E402

IMAGES, PER_IMAGE, DEPTH = 5000, 5, 50


@pytest.fixture(scope="module")
def metrics() -> Any:
    """The package's ground truth, without two right answers of ECCV Caption that are none of the split's captions."""
    metrics = _load_metrics()
    there, truth = metrics.coco_gts["t2i"], metrics.eccv_gts["i2t"]
    assert len({answer for answers in truth.values() for answer in answers} - there.keys()) == 2
    metrics.eccv_gts["i2t"] = {query: [x for x in answers if x in there] for query, answers in truth.items()}
    return metrics


@pytest.fixture(scope="module")
def gallery(metrics) -> Gallery:
    """All of the benchmark's images and captions, under made-up texts, in an order of its own."""
    owners = list(metrics.coco_gts["i2t"])
    random.Random(0).shuffle(owners)
    texts = [f"caption {number}" for owner in owners for number in metrics.coco_gts["i2t"][owner]]
    rows = torch.arange(IMAGES).repeat_interleave(PER_IMAGE)
    identities = torch.tensor(owners)
    return Gallery([*range(IMAGES)], texts, rows, identities, identities[rows])


def known(metrics) -> dict[str, CocoImage]:
    return {
        f"val2014/{owner}.jpg": CocoImage(owner, {f"caption {number}": [number] for number in numbers})
        for owner, numbers in metrics.coco_gts["i2t"].items()
    }


class Names:
    """Records that have names alone."""

    def __init__(self, gallery: Gallery) -> None:
        self.names = [f"val2014/{number}.jpg" for number in gallery.image_identities.tolist()]

    def name(self, index: int) -> str:
        return self.names[index]


def figures(gallery: Gallery, metrics: Any, answers: Nearest, monkeypatch, **reranked: CandidateScores) -> Any:
    monkeypatch.setattr("loopitr.evaluation.coco.name_of", lambda records, position: records.name(position))
    coco = CocoBenchmarks(known(metrics), metrics)
    return coco.figures(gallery, Names(gallery), answers, answers, reranked)


def truth_first(gallery: Gallery, metrics: Any, kind: str) -> Nearest:
    """Each query's right answers, then wrong ones."""
    truth = getattr(metrics, f"{kind}_gts")
    images = gallery.image_identities.tolist()
    numbers = [int(text.split()[1]) for text in gallery.captions]
    row_of = {"i2t": {number: row for row, number in enumerate(numbers)}, "t2i": {n: r for r, n in enumerate(images)}}
    lists = {}
    for side, queries in (("i2t", images), ("t2i", numbers)):
        rows = []
        for query in queries:
            right = [row_of[side][answer] for answer in truth[side].get(query, ())]
            wrong = (row for row in range(2 * DEPTH) if row not in {*right})
            rows.append((right + [next(wrong) for _ in range(DEPTH)])[:DEPTH])
        lists[side] = torch.tensor(rows)
    nothing = torch.zeros(0)
    return Nearest(Ranking(nothing, nothing), lists["i2t"], nothing, lists["t2i"], nothing)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eccv", "cxc"])
def test_its_own_ground_truth_is_perfect_and_the_reverse_is_not(gallery, metrics, kind, monkeypatch):
    answers = truth_first(gallery, metrics, kind)
    places = torch.arange(DEPTH)
    backwards = CandidateScores(places.expand(IMAGES, -1), places.expand(IMAGES * PER_IMAGE, -1))
    found = figures(gallery, metrics, answers, monkeypatch, match=backwards)
    perfect = {"eccv": {"eccv_map_at_r": 1.0, "eccv_rprecision": 1.0, "eccv_r1": 100.0}, "cxc": {"cxc_r1": 100.0}}
    for name, value in perfect[kind].items():
        assert found["dual"][name] == {"i2t": value, "t2i": value}
        assert max(found["match"][name].values()) < 0.1 * value
    assert found["dual"]["cxc_r10"]["i2t"] > 90 or kind == "eccv"


@pytest.mark.slow
def test_map_at_r_is_ours(gallery, metrics, monkeypatch):
    """Of a ranking that is neither right nor wrong: the package's mean average precision is that of `ranking.py`."""
    generator, size = torch.Generator().manual_seed(0), 300
    answers = truth_first(gallery, metrics, "eccv")
    noisy = {}
    for side, lists in (("captions", answers.captions), ("images", answers.images)):
        noisy[side] = torch.arange(DEPTH, 0, -1) + 20 * torch.rand(lists.shape, generator=generator)
    found = figures(gallery, metrics, answers, monkeypatch, match=CandidateScores(**noisy))["match"]
    truth = metrics.eccv_gts["i2t"]
    queries = [row for row, number in enumerate(gallery.image_identities.tolist()) if number in truth]
    right = torch.zeros(len(queries), DEPTH, dtype=torch.bool)
    for place, row in enumerate(queries):
        right[place, : len(truth[int(gallery.image_identities[row])])] = True
    expected = mean_average_precision_at_r(noisy["captions"][queries], right)
    assert 0.1 < expected < 0.95 and len(queries) > size
    assert found["eccv_map_at_r"]["i2t"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_a_gallery_that_is_not_the_whole_split_is_refused(gallery, metrics):
    coco, names = CocoBenchmarks(known(metrics), metrics), Names(gallery).names
    assert coco.numbers(gallery, names)[0] == gallery.image_identities.tolist()
    with pytest.raises(DataError, match="1 of their images are missing, 1 others are there"):
        coco.numbers(gallery, ["other.jpg", *names[1:]])
    wrong = replace(gallery, captions=["?", *gallery.captions[1:]])
    with pytest.raises(DataError, match="1 of their captions are missing, 1 others are there"):
        coco.numbers(wrong, names)


# Through the command


class SmallTruth:
    """The package's own sums over a ground truth of few images."""

    def __new__(cls, entries: list[dict[str, Any]]) -> Any:
        metrics = _load_metrics()
        i2t = {entry["cocoid"]: [s["sentid"] for s in entry["sentences"]] for entry in entries}
        t2i = {number: [image] for image, numbers in i2t.items() for number in numbers}
        metrics.coco_gts = {"i2t": i2t, "t2i": t2i}
        some = dict(list(i2t.items())[:3])
        metrics.eccv_gts = {"i2t": {k: [*v, 901] for k, v in some.items()}, "t2i": {901: [*some], 900: [190]}}
        metrics.cxc_gts = metrics.coco_gts
        return metrics


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "run")
    tiny_processor().save_pretrained(tmp_path / "run")
    (tmp_path / "images").mkdir()
    entries = []
    for i in range(8):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(jpeg(i))
        texts = captions(i, 2) if i else ("a red circle", " a  red circle ")  # twins, of different numbers
        sentences = [{"raw": text, "sentid": 900 + 2 * i + j} for j, text in enumerate(texts)]
        entries.append({"filename": f"{i}.jpg", "cocoid": 190 + i, "split": "test", "sentences": sentences})
    (tmp_path / "data.json").write_text(json.dumps({"images": entries}))
    return tmp_path


def options(folder, **changes: Any) -> EvaluateOptions:
    data = DataOptions(karpathy=str(folder / "data.json"), images=str(folder / "images"), split="test", num_workers=0)
    given = {"data": data, "rerank": 3, "device": "cpu", "coco_benchmarks": True, "check_overlap": False, **changes}
    return EvaluateOptions(model=str(folder / "run"), **given)


def test_evaluate_measures_and_writes_them(folder, monkeypatch, capsys):
    entries = json.loads((folder / "data.json").read_text())["images"]
    monkeypatch.setattr("loopitr.evaluation.coco._load_metrics", lambda: SmallTruth(entries))
    evaluate(options(folder, output=str(folder / "out.json")))
    written = json.loads((folder / "out.json").read_text())
    assert [*written["coco"]] == ["dual", "match", "match_plus_similarity", "reranked"]
    for head, values in written["coco"].items():
        assert values["cxc_r1"] == {side: written[head][side]["r1"] for side in ("i2t", "t2i")}
    for k in (5, 10):
        assert written["coco"]["dual"][f"cxc_r{k}"] == {side: written["dual"][side][f"r{k}"] for side in ("i2t", "t2i")}
    assert "- reranked: ECCV mAP@R i2t 0." in capsys.readouterr().out


def test_what_is_missing_is_named_before_the_work(folder, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="5000 Karpathy test images.*5000 of their images are missing, 8 others"):
        evaluate(options(folder))
    with pytest.raises(ValueError, match="coco_benchmarks needs data.karpathy"):
        evaluate(options(folder, data=DataOptions(scenes=True, split="test")))
    content = json.loads((folder / "data.json").read_text())
    del content["images"][2]["sentences"][0]["sentid"]
    (folder / "data.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"data.json is not COCO's: a caption of 2.jpg has no sentid"):
        evaluate(options(folder))
    for entry in content["images"]:
        entry["sentences"], entry["cocoid"] = [], None
    (folder / "data.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"0.jpg has no cocoid"):
        coco_images(folder / "data.json", "test")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "loopitr\[eccv\]"'):
        CocoBenchmarks({})

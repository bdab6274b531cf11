"""The examples against a brute-force ranking, and the page as a browser would read it."""

import base64
import io
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import captions, evaluate, jpeg, picture, tiny_processor, tiny_records
from PIL import Image

from loopitr.data import Record
from loopitr.evaluation import Ranking, evaluation_transform, gallery_page
from loopitr.evaluation.examples import SHOWN, TURN, Reranked, choose_examples
from loopitr.evaluation.gallery import Gallery
from loopitr.evaluation.nearest import Nearest
from loopitr.evaluation.reranking import CandidateScores
from loopitr.evaluation.thumbnails import SIDE, thumbnail

WEIGHT = 0.1
KIND = {(False, True): "gained", (True, False): "lost", (False, False): "wrong", (True, True): "right"}


@pytest.fixture(scope="module")
def model():
    model = tiny_model().eval()
    model.config.similarity_weight = WEIGHT
    return model


def all_scores(model, records):
    """Similarities `[I, T]`, match scores `[I, T]` and the captions' images `[T]`, pair by pair."""
    processor = tiny_processor()
    texts = [caption for record in records for caption in record.captions]
    owner = torch.tensor([i for i, record in enumerate(records) for _ in record.captions])
    with torch.no_grad():
        images = model.encode_images(torch.stack([evaluation_transform(processor)(r.image) for r in records]))
        inputs = processor(text=texts)
        encoded = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
        pairs = torch.cartesian_prod(torch.arange(len(records)), torch.arange(len(texts)))
        match = model.score_pairs(images, encoded, pairs).score.view(len(records), -1)
    return images.embeds @ encoded.embeds.T, match, owner, texts


def test_examples_are_those_of_a_brute_force_ranking(model):
    records = tiny_records(8, per_image=2)
    similarity, match, owner, texts = all_scores(model, records)
    result = evaluate(model, records, rerank=1000, examples=1000)
    reranking = model.reranking_score(match, similarity)
    for name, turn in (("i2t", lambda x: x), ("t2i", lambda x: x.T)):
        queries, items = (range(8), texts) if name == "i2t" else (texts, range(8))
        side, shown = result.examples[name], {example.query: example for example in result.examples[name].shown}
        assert len(side.shown) == len(queries) == len(shown) == sum(side.counts.values())
        ranks = [getattr(Ranking.from_scores(scores, owner), name) for scores in (similarity, reranking)]
        for row, query in enumerate(queries):
            example = shown[query]
            assert example.ranks == (ranks[0][row], ranks[1][row])
            first = [bool(rank[row] == 1) for rank in ranks]
            assert example.kind == KIND[tuple(first)]
            dual = turn(similarity)[row].argsort(descending=True).tolist()
            reranked = turn(reranking)[row].argsort(descending=True).tolist()
            for answers, order, score in (
                (example.dual, dual, turn(similarity)[row]),
                (example.reranked, reranked, turn(match)[row]),
            ):
                assert [answer.item for answer in answers] == [items[i] for i in order[:SHOWN]]
                assert [answer.score for answer in answers] == pytest.approx(score[order[:SHOWN]].tolist(), abs=1e-5)
                assert [answer.place for answer in answers] == [dual.index(i) + 1 for i in order[:SHOWN]]
                own = [(owner[i] == row) if name == "i2t" else (owner[row] == i) for i in order[:SHOWN]]
                assert [answer.right for answer in answers] == [bool(ok) for ok in own]
        assert +Counter(side.counts) == Counter(example.kind for example in side.shown)


def test_few_candidates_change_no_figure_and_the_dual_alone_has_examples_too(model):
    records = tiny_records(8)
    plain, shown = (evaluate(model, records, rerank=2, examples=number) for number in (0, 4))
    figures = [result.to_json() for result in (plain, shown)]
    for each in figures:
        del each["seconds"], each["pairs_per_second"]
    assert figures[0] == figures[1] and not plain.examples
    with pytest.raises(ValueError, match="has no examples"):
        gallery_page(plain, records, title="none")
    for example in shown.examples["t2i"].shown:
        assert len(example.dual) == len(example.reranked) == 2
        if not any(answer.right for answer in example.dual):
            assert math.isinf(example.ranks[1]) and example.kind in ("wrong", "lost")
    assert "not a candidate" in gallery_page(shown, records, title="two candidates")
    alone = evaluate(model, records, rerank=0, examples=3)
    for side in alone.examples.values():
        assert set(side.counts) == {"wrong", "right"} and len(side.shown) == 3
        assert all(len(example.dual) == SHOWN and not example.reranked for example in side.shown)
    page = read(gallery_page(alone, records, title="dual"))
    assert page.classes["gained"] == page.classes["lost"] == 0 and page.tags["section"] == 6


def synthetic(kinds):
    """Candidates of which each text query's first is right or not by the dual and reranked, as `kinds` say."""
    count = len(kinds)
    images = torch.stack([torch.arange(count), (torch.arange(count) + 1) % count], 1)  # own first, then another's
    dual_right = torch.tensor([kind in ("lost", "right") for kind in kinds])
    last_right = torch.tensor([kind in ("gained", "right") for kind in kinds])

    def scores(right):
        return torch.where(right[:, None], torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0]))

    def ranking(right):
        ranks = torch.where(right, 1.0, 2.0).double()
        return Ranking(i2t=ranks, t2i=ranks)

    similarity, match = scores(dual_right), CandidateScores(scores(last_right), scores(last_right))
    nearest = Nearest(ranking(dual_right), images, similarity, images, similarity)
    identities = torch.arange(count)
    texts = [f"text {i}" for i in range(count)]
    gallery = Gallery([*range(count)], texts, identities, identities, identities)
    reranked = Reranked(match=match, scores=match, ranking=ranking(last_right))
    return choose_examples(nearest, gallery, reranked, number=16)["t2i"]


def test_gains_and_losses_both_show_and_are_spread_over_the_queries():
    kinds = ["right"] * 700 + ["gained"] * 100 + ["lost"] * 50 + ["wrong"] * 150
    examples = synthetic(kinds)
    assert examples.counts == {"gained": 100, "lost": 50, "wrong": 150, "right": 700}
    assert Counter(example.kind for example in examples.shown) == {"gained": 6, "lost": 6, "wrong": 2, "right": 2}
    assert all(kinds[int(example.query.split()[1])] == example.kind for example in examples.shown)
    gained = [int(example.query.split()[1]) for example in examples.shown if example.kind == "gained"]
    assert gained == [708, 725, 741, 758, 775, 791]


@pytest.mark.parametrize(
    ("kinds", "shown"),
    [
        (["gained"] * 40, {"gained": 16}),
        (["lost"] + ["right"] * 40, {"lost": 1, "right": 15}),
        (["gained"] * 2 + ["lost"] * 40 + ["right"], {"gained": 2, "lost": 13, "right": 1}),
        (["wrong"] * 5, {"wrong": 5}),
    ],
)
def test_places_that_one_kind_cannot_fill_go_to_the_others(kinds, shown):
    assert Counter(example.kind for example in synthetic(kinds).shown) == shown
    assert {*shown} <= {*TURN}


class Page(HTMLParser):
    """Tags and classes by number, sources and addresses, and the text."""

    def __init__(self):
        super().__init__()
        self.tags, self.classes, self.sources, self.text, self.open = Counter(), Counter(), [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("href", "srcset"), (tag, name)
            if name == "class":
                self.classes.update(value.split())
            if name == "src":
                self.sources.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def read(html):
    page = Page()
    page.feed(html)
    page.close()
    assert not page.open
    return page


def test_the_page_has_every_example_with_its_pictures_and_marks(model):
    records = tiny_records(8)
    result = evaluate(model, records, rerank=6, examples=5)
    html = gallery_page(result, records, title="a run: test")
    page = read(html)
    examples = [example for side in result.examples.values() for example in side.shown]
    answers = [answer for example in examples for answer in (*example.dual, *example.reranked)]
    assert page.tags["section"] == len(examples) == 10
    assert page.tags["li"] == len(answers)
    assert page.text.count("\u2713 right") == sum(answer.right for answer in answers) > 0
    assert page.text.count("\u2717 wrong") == sum(not answer.right for answer in answers) > 0
    pictures = sum(isinstance(answer.item, int) for answer in answers) + 5
    assert len(page.sources) == pictures
    for source in page.sources:
        kind, data = source.split(",")
        assert kind == "data:image/jpeg;base64" and max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= SIDE
    for side, heading in (("t2i", "Text to image"), ("i2t", "Image to text")):
        counts = result.examples[side].counts
        row = re.search(f"<tr><th>{heading}</th>(.*?)</tr>", html)[1]
        cells = re.findall("<td>(.*?)</td>", row)
        total = sum(counts.values())
        recalls = [result.rankings[head].metrics()[side]["r1"] for head in ("dual", "reranked")]
        assert [float(re.search(r"\((.*)%\)", cell)[1]) for cell in cells[1:3]] == pytest.approx(recalls, abs=0.051)
        assert (cells[0], *cells[3:]) == (str(total), str(counts["gained"]), str(counts["lost"]))
    assert "w = 0.1" in page.text and page.text.count("a run: test") == 2


def test_captions_names_and_titles_are_text_and_nothing_is_fetched(model):
    evil = '</span><script>alert(1)</script><img src=x onerror="alert(2)"> & \u202e "quoted"'
    records = [
        Record(image=picture(i), captions=(f"{evil} {i}", captions(i, 1)[0]), name=f'{i}"><b onclick=x>\udcff.jpg')
        for i in range(6)
    ]
    records[5] = replace(records[5], captions=("word " * 500,))
    html = gallery_page(evaluate(model, records, rerank=4, examples=20), records, title=f"{evil} title")
    page = read(html)  # asserts that no attribute is an address or a handler
    assert page.tags["script"] == 0 and page.text.count("<script>alert(1)</script>") > 5
    assert r"\udcff.jpg" in html and "word " * 500 not in html and "word \u2026" not in page.text
    assert "http" not in html.replace("http-equiv", "") and "default-src 'none'" in html
    html.encode()


def test_an_image_that_opens_no_more_is_its_name(model, tmp_path):
    records = []
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
        records.append(Record(image=str(tmp_path / f"{i}.jpg"), captions=captions(i, 2), name=f"{i}.jpg"))
    result = evaluate(model, records, rerank=4, examples=8)
    (tmp_path / "2.jpg").unlink()
    page = read(gallery_page(result, records, title="gone"))
    assert "2.jpg cannot be opened" in page.text and page.text.count("cannot be opened") < len(page.sources)


def test_a_thumbnail_has_nothing_of_the_file_but_its_pixels(tmp_path):
    image, exif = picture(0, (800, 400)), Image.Exif()
    exif[0x010E], exif[0x0112] = "where I live", 6
    image.save(tmp_path / "photo.jpg", exif=exif, comment=b"where I live", icc_profile=b"where I live")
    assert b"where I live" in (tmp_path / "photo.jpg").read_bytes()
    data = base64.b64decode(thumbnail(tmp_path / "photo.jpg").split(",")[1])
    assert b"where I live" not in data
    assert Image.open(io.BytesIO(data)).size == (SIDE // 2, SIDE)  # upright

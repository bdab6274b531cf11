"""The order of a query's hits for every weight is the searcher's own, from one search; what is shown is escaped."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.small_index import EVIL, IMAGES, QUERY, open_small_index, write_small_index
from helpers.tiny_gallery import picture
from helpers.tiny_index import index

from loopitr import Retriever, Searcher
from loopitr.export.dual import export_dual
from loopitr.models.scoring import DUAL_ALONE
from loopitr.search.cached_searcher import CachedSearcher
from loopitr.search.figures import Thumbnails, caption_list, grid, text_of
from loopitr.search.page import share_of, weight_of
from loopitr.search.sources import open_source


@pytest.fixture(scope="module")
def searcher(small_index):
    return open_small_index(small_index)


def paths(placed):
    return [each.hit.path for each in placed]


@pytest.mark.parametrize("rerank", [5, 100])
def test_the_order_is_the_searchers_for_every_weight_from_one_search(searcher, rerank, monkeypatch):
    weights = [0.0, 0.02, 0.1, 1.0, 7.0, DUAL_ALONE]
    expected = [[h.path for h in searcher.search(QUERY, top=8, rerank=rerank, similarity_weight=w)] for w in weights]
    dual = [hit.path for hit in searcher.search(QUERY, top=IMAGES, rerank=0)]
    assert len({*map(tuple, expected)}) > 1  # or else the weight shows nothing
    cached, calls = CachedSearcher(searcher, rerank=rerank), []
    search = searcher.search
    monkeypatch.setattr(searcher, "search", lambda *given, **named: calls.append(named) or search(*given, **named))
    for weight, order in zip(weights, expected):
        placed = cached.by_text(QUERY, top=8, reranked=True, weight=weight)
        assert paths(placed) == order
        assert [each.place for each in placed] == [*range(1, 9)]
        assert [each.dual_place for each in placed] == [dual.index(path) + 1 for path in order]
    assert paths(cached.by_text(QUERY, top=8, reranked=True)) == expected[weights.index(cached.own_weight)]
    assert len(calls) == 1
    plain = cached.by_text(QUERY, top=8, reranked=False)
    assert paths(plain) == dual[:8] and all(each.place == each.dual_place for each in plain)
    assert all(each.hit.match is None for each in plain) and len(calls) == 2


def test_a_text_is_never_the_path_of_an_image(small_index, searcher):
    cached, path = CachedSearcher(searcher), str(small_index / "photos" / "4.jpg")
    assert searcher.search(path)[0].similarity == pytest.approx(1.0, abs=1e-4)  # the searcher takes it for the image
    found = cached.by_text(path, top=3, reranked=False)
    assert max(each.hit.similarity for each in found) < 0.999
    assert cached.by_text("/nowhere/at/all.png", top=3, reranked=True)[0].hit.match is not None


def test_an_image_finds_itself_and_the_best_captions_of_its_neighbours(small_index, searcher):
    cached, image = CachedSearcher(searcher), picture(4)
    found = cached.by_image(image, top=3)
    assert Path(found[0].hit.path).name == "4.jpg" and len(found) == 3
    captions = cached.captions(image, top=5)
    texts = [line for hit in searcher.search(image, top=IMAGES) for line in hit.columns["caption"].splitlines()]
    scores = Retriever.from_pretrained(small_index / "run").predict(
        [(text, image) for text in texts], show_progress=False
    )
    best = np.argsort(-scores)[:5]
    assert [text for text, _ in captions] == [texts[i] for i in best]
    assert [score for _, score in captions] == pytest.approx(scores[best].tolist(), abs=1e-4)


def test_without_captions_and_without_a_fusion_head(tmp_path):
    write_small_index(tmp_path, with_captions=False)
    assert CachedSearcher(open_small_index(tmp_path)).captions(picture(1), top=3) == []
    export_dual(tmp_path / "run", tmp_path / "dual")
    source = open_source(tmp_path / "photos.csv", tmp_path / "photos")
    index(source, tmp_path / "dual", tmp_path / "other", device="cpu")
    cached = CachedSearcher(Searcher.open(tmp_path / "other", device="cpu"))
    assert not cached.reranks and cached.own_weight == DUAL_ALONE
    assert paths(cached.by_text(QUERY, top=5, reranked=True)) == paths(cached.by_text(QUERY, top=5, reranked=False))
    scores = [score for _, score in cached.captions(picture(1), top=4)]
    assert scores == sorted(scores, reverse=True) and all(-1 <= score <= 1 for score in scores)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "  "}, "the query is empty"),
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"weight": -1.0}, "weight must be at least 0"),
        ({"where": "nonsense ="}, "nonsense"),
        ({"where": "nowhere > 3"}, "nowhere"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(searcher, given, message):
    with pytest.raises(ValueError, match=message) as raised:
        CachedSearcher(searcher).by_text(**{"text": QUERY, "top": 3, "reranked": True, **given})
    assert "\n" not in str(raised.value)


def test_the_slider_and_the_weight():
    assert [weight_of(share) for share in (0, 0.5, 0.8, 1)] == [0, 1, pytest.approx(4), DUAL_ALONE]
    assert [share_of(weight) for weight in (0, 1, 4, DUAL_ALONE)] == [0, 0.5, 0.8, 1]
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            weight_of(share)


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.names, self.text, self.sources = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        assert not any(name.startswith("on") or name == "href" for name, _ in attrs)
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.text += data


def test_figures_have_pictures_moves_and_texts_that_are_no_markup(searcher):
    placed = CachedSearcher(searcher).by_text(QUERY, top=IMAGES, reranked=True, weight=0.0)
    html = grid(placed, Thumbnails(searcher), moves=True)
    page = Tags(html)
    assert page.names.count("figure") == page.names.count("img") == IMAGES
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert {*page.names} <= {"div", "figure", "img", "figcaption", "span", "small"}
    assert EVIL in page.text and not set("${}`") & set(html)
    for sign, moved in (
        ("\u2191", [p.dual_place - p.place for p in placed]),
        ("\u2193", [p.place - p.dual_place for p in placed]),
    ):
        assert sum(places > 0 for places in moved) == page.text.count(sign) > 0
        assert all(f"{sign}{places}" in page.text for places in moved if places > 0)
    assert "\u2191" not in Tags(grid(placed, Thumbnails(searcher), moves=False)).text
    assert EVIL in Tags(caption_list([(EVIL, 1.0)])).text
    assert "No image found" in grid([], Thumbnails(searcher), moves=True)


def test_thumbnails_are_kept_and_a_file_that_is_gone_is_said(tmp_path, monkeypatch):
    write_small_index(tmp_path)
    searcher = open_small_index(tmp_path)
    placed, picture_of = CachedSearcher(searcher).by_text(QUERY, top=4, reranked=False), Thumbnails(searcher)
    before = grid(placed, picture_of, moves=False)
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    assert grid(placed, picture_of, moves=False) == before
    gone = Tags(grid(placed, Thumbnails(searcher), moves=False))
    assert gone.text.count("no such file") == 4 and gone.names.count("img") == 0


def test_texts_are_of_bounded_length():
    assert text_of("a" * 5_000) == "a" * 199 + "\u2026"
    assert text_of("caf\udce9 <b>") == "caf&#92;udce9 &lt;b&gt;"

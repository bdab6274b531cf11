"""`Searcher` gives what `Retriever` says of the same images, over LanceDB and over Qdrant."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.support import tiny_model
from helpers.tiny_building import save_tiny
from helpers.tiny_gallery import captions, jpeg, tiny_processor
from helpers.tiny_index import index, tiny_retriever, write_photos

from loopitr import Retriever, Searcher, export_dual
from loopitr.search import match_scores
from loopitr.search.indexing import add_images
from loopitr.search.manifest import MANIFEST, read_manifest
from loopitr.search.removing import remove_images
from loopitr.search.results_page import write_page

COUNT, WEIGHT = 12, 0.3
TEXTS = captions(0, 3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "photos", COUNT)


@pytest.fixture(scope="module")
def retriever():
    model = tiny_model(fusion={"agreement": 12})
    model.config.similarity_weight = WEIGHT
    return Retriever(model, tiny_processor())


@pytest.fixture(scope="module", params=["lance", "qdrant"])
def folder(request, photos, retriever, tmp_path_factory):
    table = photos.parent / "data.jsonl"
    rows = [{"image": f"photos/{i:03}.jpg", "caption": f"no. {i}", "group": i % 3} for i in range(COUNT)]
    table.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path_factory.mktemp(request.param) / "index"
    store = str(output.parent / "server") if request.param == "qdrant" else None
    index(table, retriever, output, store=store)
    return output


@pytest.fixture
def searcher(folder, retriever):
    return Searcher.open(folder, model=retriever)


def names(hits):
    return [os.path.basename(hit.path) for hit in hits]


def test_hits_are_what_the_retriever_ranks(searcher, retriever, photos):
    paths = sorted(photos.iterdir())
    embeds = retriever.encode_images(paths)
    for text in TEXTS:
        similarity = retriever.encode_texts(text) @ embeds.T
        order = np.argsort(-similarity)
        hits = searcher.search(text, top=COUNT, rerank=0)
        assert names(hits) == [paths[i].name for i in order]
        assert [hit.similarity for hit in hits] == pytest.approx(similarity[order].tolist(), abs=1e-5)
        assert all(hit.match is None and hit.score == hit.similarity for hit in hits)
        ranked = retriever.rank(text, paths, top_k=None)
        reranked = searcher.search(text, top=COUNT)
        assert names(reranked) == [paths[entry["corpus_id"]].name for entry in ranked]
        assert [hit.score for hit in reranked] == pytest.approx([entry["score"] for entry in ranked], abs=2e-2)  # fp16
        scale = retriever.model.dual.scale.item()
        assert all(hit.score == pytest.approx(hit.match + WEIGHT * scale * hit.similarity) for hit in reranked)
        assert names(searcher.search(text, top=2)) == names(reranked)[:2]
        alone = searcher.search(text, top=COUNT, similarity_weight=1e9)
        assert names(alone) == names(hits)
        match_only = searcher.search(text, top=COUNT, similarity_weight=0)
        assert [hit.score for hit in match_only] == sorted((hit.match for hit in match_only), reverse=True)


def test_candidates_that_are_not_reranked_follow(searcher):
    plain, hits = (searcher.search(TEXTS[0], top=COUNT, rerank=k) for k in (0, 4))
    assert {*names(hits)[:4]} == {*names(plain)[:4]} and names(hits)[4:] == names(plain)[4:]
    assert [hit.match is None for hit in hits] == [False] * 4 + [True] * (COUNT - 4)
    assert len(searcher.search(TEXTS[0], top=3, rerank=2)) == 3
    for top, rerank in ((500, 1000), (10**30, 0), (3, 10**30)):
        assert len(searcher.search(TEXTS[0], top=top, rerank=rerank)) == min(top, COUNT)


def test_an_image_finds_itself_and_its_neighbours(searcher, photos, retriever):
    for query in (
        photos / "003.jpg",
        str(photos / "003.jpg"),
        searcher.picture(searcher.search(photos / "003.jpg")[0]),
    ):
        hits = searcher.search(query, top=3)
        assert names(hits)[0] == "003.jpg" and hits[0].similarity == pytest.approx(1, abs=1e-5)
        assert all(hit.match is None for hit in hits)


def test_conditions_on_columns(searcher):
    assert names(searcher.search("a dog", where="caption = 'no. 7'")) == ["007.jpg"]
    for where, wanted in (
        ('"group" = 1', {1, 4, 7, 10}),
        ("\"group\" = 1 AND width >= 40 AND NOT caption = 'no. 1'", {4, 7, 10}),
        ("caption IN ('no. 1', 'no. 2') OR caption = 'no. 3'", {1, 2, 3}),
        ('"group" <> 0 AND size BETWEEN 1 AND 100000 AND caption IS NOT NULL AND ("group" < 2)', {1, 4, 7, 10}),
        ("width > 40", set()),
        ("mtime > timestamp '2001-01-01 00:00:00' AND caption LIKE '%. 5%'", {5}),
    ):
        if searcher.manifest.store is not None:
            where = where.replace("LIKE '%. 5%'", "HAS '5 no'")
        assert {*names(searcher.search("a dog", top=50, where=where))} == {f"{i:03}.jpg" for i in wanted}, where
    hit = searcher.search("a dog", where="caption = 'no. 7'")[0]
    expected = {"caption": "no. 7", "group": 1, "width": 40, "height": 30, "size": len(jpeg(7))}
    assert {name: hit.columns[name] for name in expected} == expected and "embed" not in hit.columns
    for where in ("nonsense = 3", "width >", "width > 3 3", "width > 3 size < 9", " ", "width = 3 AND"):
        with pytest.raises(ValueError, match="^where ") as raised:
            searcher.search("a dog", where=where)
        assert "\n" not in str(raised.value)


def test_reranking_with_kept_tokens_opens_no_image(searcher, monkeypatch):
    expected = searcher.search(TEXTS[1])

    def open_image(*_, **__):
        raise AssertionError("an image is opened")

    monkeypatch.setattr(match_scores, "decode_image", open_image)
    monkeypatch.setattr(match_scores, "BLOCK", 5)
    again = searcher.search(TEXTS[1])
    assert names(again) == names(expected)
    assert [hit.match for hit in again] == pytest.approx([hit.match for hit in expected], abs=1e-4)


def test_info(searcher, folder):
    info = searcher.info()
    assert (info["images"], info["complete"], info["skipped"], info["tokens"]) == (COUNT, True, 0, "fp16")
    assert {"path", "size", "mtime", "width", "height", "caption", "group"} == {*info["columns"]}
    assert len(searcher) == COUNT and json.dumps(info)


def test_queries_that_are_none(searcher, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for query, message in (
        ("", "the query is empty"),
        (" \n", "the query is empty"),
        ("nowhere.jpg", "nowhere.jpg: unreadable image (no such file)"),
        (tmp_path / "broken.jpg", "not a known image format"),
        ("half \ud83d", "not valid Unicode"),
        (["a dog", "a cat"], "the query must be one text or one image, got list"),
        (None, "the query must be one text or one image, got NoneType"),
    ):
        with pytest.raises(ValueError) as raised:
            searcher.search(query)
        assert message in str(raised.value)
    for options in ({"top": 0}, {"rerank": -1}, {"similarity_weight": -1.0}, {"similarity_weight": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            searcher.search("a dog", **options)
    assert len(searcher.search("?! ... --- ,,,", top=3)) == 3
    with pytest.warns(UserWarning, match="1 of 1 texts were cut"):
        assert len(searcher.search("dog " * 10_000, top=3)) == 3


def test_images_whose_files_are_gone(tmp_path, retriever):
    photos = write_photos(tmp_path / "photos", 4)
    index(photos, retriever, tmp_path / "index", tokens="none")
    (photos / "002.jpg").unlink()
    hits = Searcher.open(tmp_path / "index", model=retriever).search("a dog")
    assert names(hits)[-1] == "002.jpg" and [hit.match is None for hit in hits] == [False] * 3 + [True]
    page = write_page(Searcher.open(tmp_path / "index", model=retriever), "<b>a dog", hits, tmp_path / "page.html")
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 3 and "no such file" in text and "&lt;b&gt;a dog" in text


def test_an_index_says_which_model_it_wants(tmp_path, photos):
    run = save_tiny(tmp_path / "run")
    index(photos, run, tmp_path / "index", device="cpu")
    assert read_manifest(tmp_path / "index").model == run
    assert len(Searcher.open(tmp_path / "index", device="cpu").search("a dog", top=3)) == 3
    export_dual(run, tmp_path / "dual")  # It has the same vectors.
    hits = Searcher.open(tmp_path / "index", model=tmp_path / "dual", device="cpu").search("a dog")
    assert all(hit.match is None for hit in hits)
    other = tiny_retriever(seed=1)
    with pytest.raises(ValueError, match="was indexed with another model .*/run, "):
        Searcher.open(tmp_path / "index", model=other)
    Path(run, "config.json").unlink()
    with pytest.raises(OSError, match="holds no model"):
        Searcher.open(tmp_path / "index")


def test_what_is_no_index(tmp_path, photos, retriever):
    with pytest.raises(FileNotFoundError, match="is not a search index: no such folder"):
        Searcher.open(tmp_path / "none", model=retriever)
    with pytest.raises(FileNotFoundError, match="there is no manifest.json in it"):
        Searcher.open(tmp_path, model=retriever)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file is not a search index: it is a file"):
        Searcher.open(tmp_path / "file", model=retriever)
    index(photos, retriever, tmp_path / "index")
    manifest = tmp_path / "index" / MANIFEST
    content = manifest.read_text()
    for damaged, message in (
        (content[:40], "manifest.json is damaged"),
        ("[]", "manifest.json is damaged"),
        (json.dumps({**json.loads(content), "format": 0}), "it has format 0, this version of loopitr reads format 1"),
        (json.dumps({"format": 1}), "manifest.json is damaged"),
    ):
        manifest.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            Searcher.open(tmp_path / "index", model=retriever)
    manifest.write_text(content)
    (tmp_path / "index" / "images.lance").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a damaged index: .*images.*; repeat `loopitr search index`"):
        Searcher.open(tmp_path / "index", model=retriever)
    assert index(photos, retriever, tmp_path / "index").added == COUNT


def test_files_of_an_index_that_are_cut_off_are_one_line_that_names_it(tmp_path, photos, retriever):
    for table, use in (("images", index), ("images", None), ("contents", index), ("contents", None)):
        folder = tmp_path / f"{table} {use is None}"
        index(photos, retriever, folder)
        for file in (folder / f"{table}.lance" / "data").iterdir():
            os.truncate(file, 100)
        with pytest.raises(ValueError, match=f"^{folder}: the index cannot be read: "):
            if use is None:
                Searcher.open(folder, model=retriever).search("a dog")
            else:
                index(photos, retriever, folder)


def test_a_searcher_sees_what_is_added_and_removed_meanwhile(tmp_path, retriever):
    photos = write_photos(tmp_path / "photos", 4)
    index(photos, retriever, tmp_path / "index")
    searcher = Searcher.open(tmp_path / "index", model=retriever)
    assert sorted(names(searcher.search("a dog"))) == [f"{i:03}.jpg" for i in range(4)]
    write_photos(photos, 2, first=4)
    add_images(photos, tmp_path / "index", model=retriever, num_workers=0, show_progress=False)
    remove_images(tmp_path / "index", [photos / "000.jpg"])
    hits = searcher.search("a dog")
    assert sorted(names(hits)) == [f"{i:03}.jpg" for i in range(1, 6)] and all(hit.match is not None for hit in hits)


def test_tokens_in_another_place(tmp_path, photos, retriever):
    place = tmp_path / "place"
    index(photos, retriever, tmp_path / "index", contents=str(place))
    assert not (tmp_path / "index" / "contents.lance").exists() and (place / "contents.lance").is_dir()
    hits = Searcher.open(tmp_path / "index", model=retriever).search("a dog")
    assert all(hit.match is not None for hit in hits)
    with pytest.raises(ValueError, match="place holds the contents of an index already"):
        index(photos, retriever, tmp_path / "other", contents=str(place))


def test_a_disk_that_is_full(tmp_path, photos, retriever, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(ValueError, match="keeping the tokens of 12 images needs .* GiB, 0.0 are free; index with"):
            index(photos, retriever, tmp_path / "index")
        index(photos, retriever, tmp_path / "bare", tokens="none")

    def full(*_, **__):
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), lance/src/x.rs:3")

    with monkeypatch.context() as patched:
        patched.setattr("lancedb.table.LanceTable.add", full)
        with pytest.raises(OSError, match="table 'contents' of the index cannot be written to: .*No space left"):
            index(photos, retriever, tmp_path / "index")
    assert index(photos, retriever, tmp_path / "index").added == COUNT


def test_a_store_that_does_not_answer_and_one_that_is_taken(tmp_path, photos, retriever):
    with pytest.raises(ValueError, match="^the store http://127.0.0.1:9: "):
        index(photos, retriever, tmp_path / "index", store="http://127.0.0.1:9")
    store = str(tmp_path / "server")
    index(photos, retriever, tmp_path / "one" / "index", store=store)
    with pytest.raises(ValueError, match="has a collection 'index' already"):
        index(photos, retriever, tmp_path / "two" / "index", store=store)
    index(photos, retriever, tmp_path / "two" / "index", store=store, collection="two")
    assert index(photos, retriever, tmp_path / "two" / "index").unchanged == COUNT
    (photos / "zzz.jpg").write_bytes(jpeg(40))
    try:
        assert index(photos, retriever, tmp_path / "two" / "index").added == 1
        assert remove_images(tmp_path / "two" / "index", where=f"path = '{photos}/zzz.jpg'") == 1
        assert len(Searcher.open(tmp_path / "two" / "index", model=retriever)) == COUNT
    finally:
        (photos / "zzz.jpg").unlink()

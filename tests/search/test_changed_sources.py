"""An index follows its source: columns that have changed, images that have, and what a later source does not say."""

import csv
import os
import shutil

import pytest
from helpers.tiny_gallery import jpeg
from helpers.tiny_index import index, listed, tiny_retriever, write_photos

from loopitr import Searcher
from loopitr.search.cached_searcher import CachedSearcher
from loopitr.search.figures import Thumbnails
from loopitr.search.removing import remove_images
from loopitr.search.sources import open_source


@pytest.fixture(scope="module")
def retriever():
    return tiny_retriever()


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos", 3)


def table(photos, columns, *rows):
    with (photos / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", *columns], *([f"{i:03}.jpg", *row] for i, row in enumerate(rows))])
    return open_source(photos / "data.csv")


@pytest.mark.parametrize("store", [None, "server"])
def test_columns_follow_their_table_and_no_image_is_opened_for_it(tmp_path, photos, retriever, store, monkeypatch):
    store = store and str(tmp_path / store)
    index(photos, retriever, tmp_path / "index", store=store)
    searcher = Searcher.open(tmp_path / "index", model=retriever)

    def columns(*names):
        hits = sorted(searcher.search("a dog"), key=lambda hit: hit.path)
        return [tuple(hit.columns.get(name) for name in names) for hit in hits]

    with monkeypatch.context() as patched:
        patched.setattr("loopitr.search.writer.opened_and_encoded", lambda source, positions, *_, **__: iter([]))
        report = index(table(photos, ["caption"], ["a"], ["b"], ["c"]), retriever, tmp_path / "index")
        assert (report.described, report.unchanged) == (3, 0) and "3 with other columns" in report.summary()
        assert columns("caption") == [("a",), ("b",), ("c",)]
        changed = table(photos, ["caption", "year"], ["a", 1], ["B", 2], ["", ""])
        assert index(changed, retriever, tmp_path / "index").described == 3
        assert columns("caption", "year") == [("a", 1), ("B", 2), (None, None)]
        assert index(changed, retriever, tmp_path / "index").unchanged == 3
    (photos / "001.jpg").write_bytes(jpeg(9))
    os.utime(photos / "001.jpg", (1, 1))
    assert index(photos, retriever, tmp_path / "index").updated == 1  # A folder has no captions, and takes none away.
    assert columns("caption", "year") == [("a", 1), ("B", 2), (None, None)]
    assert [hit.path for hit in searcher.search("a dog", where="year = 2")] == [str(photos / "001.jpg")]


def test_what_is_no_number_is_no_value(tmp_path, photos, retriever):
    index(table(photos, ["stars"], ["nan"], ["2.5"], ["4"]), retriever, tmp_path / "index")
    hits = Searcher.open(tmp_path / "index", model=retriever).search("a dog", where="stars > 3")
    assert [os.path.basename(hit.path) for hit in hits] == ["002.jpg"]


def test_numbers_are_kept_whole_or_refused(tmp_path, photos, retriever):
    index(table(photos, ["code", "year"], ["007", 1], ["10", 2], ["0", 3]), retriever, tmp_path / "index")
    assert [row.columns["code"] for _, row in sorted(listed(tmp_path / "index").items())] == ["007", "10", "0"]
    with pytest.raises(ValueError, match=r"column 'year' of the index holds int64, and is now to hold 1\.5"):
        index(table(photos, ["year"], [1.5], [2], [3]), retriever, tmp_path / "index")
    assert index(table(photos, ["year"], ["1.0"], ["2.0"], ["3.0"]), retriever, tmp_path / "index").unchanged == 3


def test_a_file_that_changed_is_not_reranked_as_the_one_that_was_indexed(tmp_path, photos, retriever):
    index(photos, retriever, tmp_path / "index", tokens="none")
    shutil.copy(photos / "001.jpg", photos / "000.jpg")
    searcher = Searcher.open(tmp_path / "index", model=retriever)
    with pytest.warns(UserWarning, match="000.jpg has changed since the index was made"):
        hits = searcher.search("a dog")
    assert [hit.match is None for hit in hits] == [False, False, True] and hits[-1].path.endswith("000.jpg")


def test_a_page_shows_what_is_added_and_replaced_meanwhile(tmp_path, photos, retriever):
    index(photos, retriever, tmp_path / "index")
    searcher = Searcher.open(tmp_path / "index", model=retriever)
    cached, picture = CachedSearcher(searcher), Thumbnails(searcher)
    first = cached.by_text("a dog", top=9, reranked=True)
    shown = {placed.hit.path: picture(placed.hit) for placed in first}
    write_photos(photos, 1, first=7)
    (photos / "000.jpg").write_bytes(jpeg(44))
    os.utime(photos / "000.jpg", (1, 1))
    index(photos, retriever, tmp_path / "index")
    later = {placed.hit.path: picture(placed.hit) for placed in cached.by_text("a dog", top=9, reranked=True)}
    assert len(later) == 4 and [path for path in shown if shown[path] != later[path]] == [str(photos / "000.jpg")]
    remove_images(tmp_path / "index", [photos / "001.jpg"])
    assert len(cached.by_text("a dog", top=9, reranked=True)) == 3


def test_two_files_with_one_path_as_text(tmp_path, retriever):
    photos = write_photos(tmp_path / "photos", 0)
    for name, seed in ((b"/raw\xff.jpg", 1), (b"/raw\\xff.jpg", 2)):
        with open(os.fsencode(photos) + name, "wb") as file:
            file.write(jpeg(seed))
    index(photos, retriever, tmp_path / "index")
    searcher = Searcher.open(tmp_path / "index", model=retriever)
    one, other = searcher.search("a dog")
    assert one.path == other.path and searcher.picture(one).tobytes() != searcher.picture(other).tobytes()


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, photos, retriever, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert index("~/photos", retriever, "~/index").added == 3
    assert len(Searcher.open("~/index", model=retriever)) == 3
    assert remove_images("~/index", ["~/photos/000.jpg"]) == 1

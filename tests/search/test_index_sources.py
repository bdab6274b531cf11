"""Tables and `datasets` sources as an index: captions, other columns, what is broken."""

import json
import os
from types import SimpleNamespace

import pytest
from helpers.tiny_gallery import picture
from helpers.tiny_index import index, listed, tiny_retriever, write_photos

from loopitr import Searcher
from loopitr.search.indexing import add_images
from loopitr.search.manifest import read_manifest
from loopitr.search.sources import folder_source
from loopitr.search.writer import Writer


def test_a_table_with_captions_and_other_columns(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos", 4)
    lines = ["image,caption,year,stars,public,width", "000.jpg,a red circle,2020,1.5,true,x", "000.jpg,a dog,2020,,,x"]
    lines += [
        "001.jpg,a blue square,2021,2,FALSE,y",
        "./001.jpg,a blue square,,,,y",
        "nowhere.jpg,gone,2022,,,",
        ",no path,,,,",
    ]
    (tmp_path / "photos" / "data.csv").write_text("\n".join(lines))
    retriever = tiny_retriever()
    report = index(tmp_path / "photos" / "data.csv", retriever, tmp_path / "index")
    assert report.added == 2 and sorted(report.skipped.values()) == ["no image path", "no such file"]
    rows = listed(tmp_path / "index")
    assert rows["000.jpg"].columns["caption"] == "a red circle\na dog"
    assert {
        name: rows["001.jpg"].columns[name] for name in ("caption", "year", "stars", "public", "width", "width_")
    } == {"caption": "a blue square", "year": 2021, "stars": 2.0, "public": False, "width": 40, "width_": "y"}
    searcher = Searcher.open(tmp_path / "index", model=retriever)
    for where, names in (
        ("year > 2020", {"001.jpg"}),
        ("caption LIKE '%dog%'", {"000.jpg"}),
        ("public AND stars < 2", {"000.jpg"}),
        ("width = 40", {"000.jpg", "001.jpg"}),
        ("mtime < timestamp '2000-01-01 00:00:00'", set()),
    ):
        assert {os.path.basename(hit.path) for hit in searcher.search("a dog", where=where)} == names, where
    assert (
        add_images(tmp_path / "photos", tmp_path / "index", model=retriever, num_workers=0, show_progress=False).added
        == 2
    )
    assert "year" not in listed(tmp_path / "index")["003.jpg"].columns
    more = tmp_path / "more.jsonl"
    write_photos(tmp_path / "more", 1, first=50)
    more.write_text(json.dumps({"file": "050.jpg", "caption": ["one", "two"], "place": "Rome"}))
    report = add_images(
        more,
        tmp_path / "index",
        images=tmp_path / "more",
        image_column="file",
        model=retriever,
        num_workers=0,
        show_progress=False,
    )
    row = listed(tmp_path / "index")["050.jpg"]
    write_photos(tmp_path / "more", 1, first=51)
    more.write_text(json.dumps({"image": "51.jpg", "year": "late"}).replace("51", "more/051"))
    with (
        monkeypatch.context() as patched,
        pytest.raises(ValueError, match="column 'year' of the index holds int64, and is now to hold 'late'"),
    ):
        patched.setattr(Writer, "_encode", None)  # It is found before the first image is encoded,
        add_images(more, tmp_path / "index", model=retriever, num_workers=0, show_progress=False)
    assert read_manifest(tmp_path / "index").complete  # and the index stays as it was.
    assert row.columns["caption"] == "one\ntwo" and row.columns["place"] == "Rome" and "year" not in row.columns


def test_integers_beyond_64_bits_are_texts(tmp_path):
    write_photos(tmp_path, 2)
    rows = [f"000.jpg,{10**22},{2**63 - 1},{'9' * 5000}", f"001.jpg,7,-{2**63},-5"]
    (tmp_path / "data.csv").write_text("\n".join(["image,code,number,long", *rows]))
    index(tmp_path / "data.csv", tiny_retriever(), tmp_path / "index")
    first, second = (listed(tmp_path / "index")[name].columns for name in ("000.jpg", "001.jpg"))
    assert (first["code"], second["code"]) == (str(10**22), "7")
    assert (first["number"], second["number"]) == (2**63 - 1, -(2**63))
    assert (first["long"], second["long"]) == ("9" * 5000, "-5")


def test_columns_get_names_that_an_index_can_have(tmp_path):
    write_photos(tmp_path, 1)
    header = ",image,meta.size,_distance,_rowid,size,Path,two words,a`b"
    (tmp_path / "data.csv").write_text(f"{header}\n0,000.jpg,1,2,3,4,5,6,7\n")
    retriever = tiny_retriever()
    index(tmp_path / "data.csv", retriever, tmp_path / "index")
    searcher = Searcher.open(tmp_path / "index", model=retriever)
    (hit,) = searcher.search("a dog", where="meta_size = 1 AND `Path` = 5 AND `two words` = 6")
    wanted = {
        "meta_size": 1,
        "_distance_": 2,
        "_rowid_": 3,
        "size_": 4,
        "Path": 5,
        "two words": 6,
        "a_b": 7,
        "unnamed": 0,
    }
    assert {name: hit.columns[name] for name in wanted} == wanted
    (tmp_path / "data.csv").write_text("image,a.b,a_b\n000.jpg,1,2\n")
    with pytest.raises(ValueError, match="columns 'a.b' and 'a_b' would both be 'a_b' in the index; rename one"):
        index(tmp_path / "data.csv", retriever, tmp_path / "other")


def test_halves_of_characters_in_json(tmp_path):
    write_photos(tmp_path, 1)
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "000.jpg", "caption": "a \ud83d\0dog"}))
    index(tmp_path / "data.jsonl", tiny_retriever(), tmp_path / "index")
    assert listed(tmp_path / "index")["000.jpg"].columns["caption"] == "a \\ud83d\0dog"


def test_times_of_change_beyond_the_calendar(tmp_path, monkeypatch):
    photos, stat = write_photos(tmp_path / "photos", 2), os.stat

    def late(path, *arguments, **options):
        status = stat(path, *arguments, **options)
        if not str(path).endswith("001.jpg"):
            return status
        return SimpleNamespace(st_mode=status.st_mode, st_size=status.st_size, st_mtime_ns=10**21)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", late)
        source = folder_source(photos)
    assert index(source, tiny_retriever(), tmp_path / "index").added == 2
    assert index(source, tiny_retriever(), tmp_path / "index").unchanged == 2
    assert listed(tmp_path / "index")["001.jpg"].columns["mtime"].year == 9999


def test_a_datasets_source(tmp_path):
    import datasets  # slow, and of one test alone

    images = [picture(0), picture(1), None]
    own = {"text": ["a dog", "a card", "none"], "id": [4, 5, 6], "lines": [[], ["a", None, "b"], None]}
    data = datasets.Dataset.from_dict({"picture": images, **own})
    data = data.cast_column("picture", datasets.Image())
    data.to_parquet(str(tmp_path / "data.parquet"))
    from loopitr.search.hub_source import hub_source

    source = hub_source("parquet", "train", "picture", str(tmp_path / "data.parquet"))
    retriever = tiny_retriever()
    report = index(source, retriever, tmp_path / "index", num_workers=1)
    assert report.added == 2 and [*report.skipped.values()] == ["no image"]
    searcher = Searcher.open(tmp_path / "index", model=retriever)
    (hit,) = searcher.search(picture(1), top=1)
    assert hit.path.endswith("[train] row 1") and hit.columns["text"] == "a card" and hit.columns["id_"] == 5
    assert hit.columns["lines"] == "a\nb"
    assert searcher.picture(hit).tobytes() == picture(1).tobytes()
    assert index(source, retriever, tmp_path / "index").unchanged == 2
    bare = tmp_path / "bare"
    index(source, retriever, bare, tokens="none")
    again = Searcher.open(bare, model=retriever).search("a red card", where="id_ < 6")
    expected = searcher.search("a red card")
    assert [hit.path for hit in again] == [hit.path for hit in expected]
    assert [hit.match for hit in again] == pytest.approx([hit.match for hit in expected], abs=1e-2)


def test_images_in_a_source_are_told_apart_by_their_bytes_and_its_place(tmp_path, monkeypatch):
    import datasets  # slow, and of two tests alone

    from loopitr.search.hub_source import hub_source

    def write(folder, *seeds):
        folder.mkdir(exist_ok=True)
        cells = []
        for seed in seeds:
            picture(seed).save(tmp_path / "equal.bmp")  # Pictures of one size have files of one length.
            cells.append({"bytes": (tmp_path / "equal.bmp").read_bytes(), "path": None})
        data = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image())
        data.to_parquet(str(folder / "data.parquet"))
        monkeypatch.chdir(folder)
        return hub_source("parquet", "train", data_files="data.parquet")

    retriever = tiny_retriever()
    assert index(write(tmp_path / "one", 0, 1), retriever, tmp_path / "index").added == 2
    report = index(write(tmp_path / "one", 5, 1), retriever, tmp_path / "index")
    assert (report.updated, report.unchanged) == (1, 1)
    assert Searcher.open(tmp_path / "index", model=retriever).search(picture(5), top=1)[0].similarity > 0.999
    assert index(write(tmp_path / "two", 7, 8), retriever, tmp_path / "index").added == 2

"""Karpathy JSON, ALBEF lists and tables: what they read, what they skip, what they refuse."""

import csv
import json
from pathlib import Path

import pytest

from loopitr.data import DataError, DataOptions, LoadReport, load_albef, load_karpathy, load_records, load_table
from loopitr.data.files import Row, group_rows
from loopitr.data.karpathy import join_lists
from loopitr.data.report import clean_captions


def entry(index, split, captions, **more):
    return {
        "filename": f"{index}.png",
        "split": split,
        "imgid": index,
        "sentences": [{"raw": c} for c in captions],
        **more,
    }


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def karpathy(tmp_path, entries):
    return write(tmp_path / "data.json", {"images": entries, "dataset": "x"})


def test_karpathy_reads_a_split(tmp_path, image_dir):
    path = karpathy(
        tmp_path,
        [entry(0, "train", ["a cat", "two  cats "]), entry(1, "val", ["a dog"]), entry(2, "restval", ["a cow"])],
    )
    report = LoadReport()
    train = load_karpathy(path, image_dir, "train", report)
    assert [r.captions for r in train] == [("a cat", "two cats"), ("a cow",)]
    assert [r.identity for r in train] == [0, 2] and train[0].image == image_dir / "0.png" and train[0].name == "0.png"
    assert (report.images, report.captions, report.skipped) == (2, 3, 0)
    assert [r.identity for r in load_karpathy(path, image_dir, "val", report)] == [1]
    assert [r.identity for r in load_karpathy(path, image_dir, "restval", report)] == [2]


def test_karpathy_counts_empty_captions_and_names_them(tmp_path, image_dir):
    path = karpathy(tmp_path, [entry(0, "val", ["a cat", "  ", ""]), entry(1, "val", [" "]), entry(2, "val", [])])
    report = LoadReport()
    assert [r.captions for r in load_karpathy(path, image_dir, "val", report)] == [("a cat",)]
    assert report.counts == {"empty caption": 3, "no captions": 2}
    assert "1.png" in report.summary() and "2.png" in report.summary()


def test_karpathy_image_listed_twice_is_one_record(tmp_path, image_dir):
    path = karpathy(tmp_path, [entry(0, "val", ["a"]), entry(1, "val", ["b"]), entry(0, "val", ["c"])])
    records = load_karpathy(path, image_dir, "val", LoadReport())
    assert [(r.name, r.captions, r.identity) for r in records] == [("0.png", ("a", "c"), 0), ("1.png", ("b",), 1)]


def test_karpathy_identities_differ_when_ids_do_not(tmp_path, image_dir):
    path = karpathy(tmp_path, [entry(0, "val", ["a"]), entry(1, "val", ["b"], imgid=0)])
    assert len({r.identity for r in load_karpathy(path, image_dir, "val", LoadReport())}) == 2


def test_karpathy_filepath_nested_or_flat(tmp_path, image_dir):
    path = karpathy(tmp_path, [entry(0, "val", ["a"], filepath="val2014")])
    assert load_karpathy(path, image_dir, "val", LoadReport())[0].image == image_dir / "0.png"
    (image_dir / "val2014").mkdir()
    (image_dir / "0.png").rename(image_dir / "val2014" / "0.png")
    assert load_karpathy(path, image_dir, "val", LoadReport())[0].image == image_dir / "val2014" / "0.png"


def test_karpathy_refuses(tmp_path, image_dir):
    def fails(match, path, images=image_dir, split="val"):
        with pytest.raises(DataError, match=match) as caught:
            load_karpathy(path, images, split, LoadReport())
        assert "\n" not in str(caught.value)

    good = karpathy(tmp_path, [entry(0, "val", ["a"]), entry(1, "dev", ["b"]), entry(2, "dev", [" "])])
    fails("nowhere.json: No such file", tmp_path / "nowhere.json")
    fails("not valid JSON", write(tmp_path / "broken.json", '{"images": ['))
    fails("data.albef", write(tmp_path / "list.json", []))
    fails("no list 'images'", write(tmp_path / "dict.json", {"x": 1}))
    fails(r"images\[0\] needs 'filename'", write(tmp_path / "bare.json", {"images": [{"split": "val"}]}))
    fails("no such image folder", good, images=tmp_path / "nowhere")
    fails("no split 'test'; it has dev, val", good, split="test")
    fails("none of its first 1 images exists; tried .*tmp", good, images=tmp_path)
    fails(
        "no image with a caption in split 'x'",
        write(tmp_path / "e.json", {"images": [entry(0, "x", [" "])]}),
        split="x",
    )


def test_albef_groups_by_image_and_never_splits_strings(tmp_path, image_dir):
    path = write(
        tmp_path / "a.json",
        [
            {"image": "0.png", "caption": "a cat", "image_id": "coco_7"},
            {"image": "1.png", "caption": ["a dog", "", "two dogs"], "image_id": "coco_8"},
            {"image": "0.png", "caption": "one cat", "image_id": "coco_7"},
            {"image": "2.png", "caption": "the same cat", "image_id": "coco_7"},
        ],
    )
    report = LoadReport()
    records = load_albef(path, image_dir, report)
    assert [r.captions for r in records] == [("a cat", "one cat"), ("a dog", "two dogs"), ("the same cat",)]
    assert records[0].identity == records[2].identity != records[1].identity
    assert report.counts == {"empty caption": 1}


def test_images_of_one_identity_keep_it_through_an_image_of_two(tmp_path, image_dir):
    """Else one's captions would be negatives of the other."""
    rows = [{"image": f"{image}.png", "caption": "a cat", "image_id": key} for image, key in ((0, 7), (0, 8), (1, 8))]
    one = load_albef(write(tmp_path / "one.json", rows), image_dir, LoadReport())
    assert [record.identity for record in one] == [0, 0]
    for keys in ((5, 5), (5, 6)):
        rows = [{"image": f"{image}.png", "caption": "a cat", "image_id": key} for image, key in zip((2, 1), keys)]
        two = load_albef(write(tmp_path / "two.json", rows), image_dir, LoadReport())
        joined = {Path(str(record.image)).name: record.identity for record in join_lists([one, two])}
        assert joined == {"0.png": 0, "1.png": 0, "2.png": 0 if keys == (5, 5) else 1}


def test_albef_refuses(tmp_path, image_dir):
    for content, match in [
        ({"images": []}, "data.karpathy"),
        ([{"image": "0.png"}], "item 0 needs"),
        ([{"image": "0.png", "caption": 5}], "must be text or a list"),
        ([{"image": "0.png", "caption": [5]}], "must be text, got int"),
        ([{"image": "0.png", "caption": ""}], "no image with a caption"),
        ([{"image": "x.png", "caption": "a"}], "tried"),
    ]:
        with pytest.raises(DataError, match=match):
            load_albef(write(tmp_path / "a.json", content), image_dir, LoadReport())


def table(path, rows, header=("image", "caption", "split")):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([header, *rows])
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_table_groups_rows(tmp_path, image_dir, name):
    path = table(
        tmp_path / name,
        [
            ("0.png", "a cat, asleep", "train"),
            ("1.png", '["a dog", "[sic] dogs"]', "train"),
            ("0.png", "[one] cat", "train"),
            ("2.png", "a cow", "val"),
            ("3.png", " ", "train"),
            ("", "lost", "train"),
        ],
    )
    report = LoadReport()
    records = load_table(path, image_dir, report, split="train")
    assert [(r.name, r.captions) for r in records] == [
        ("0.png", ("a cat, asleep", "[one] cat")),
        ("1.png", ("a dog", "[sic] dogs")),
    ]
    assert report.counts == {"no image path": 1, "empty caption": 1, "no captions": 1}
    assert len(load_table(path, image_dir, LoadReport())) == 3


def test_two_spellings_of_a_path_are_one_image(tmp_path, image_dir):
    spellings = ("0.png", "./0.png", "1.png", ".//0.png", str(image_dir / "0.png"))
    rows = [{"image": name, "caption": f"caption {number}"} for number, name in enumerate(spellings)]
    captions = {"0.png": ("caption 0", "caption 1", "caption 3", "caption 4"), "1.png": ("caption 2",)}
    for records in (
        load_albef(write(tmp_path / "a.json", rows), image_dir, LoadReport()),
        load_table(table(tmp_path / "t.csv", [(*row.values(), "") for row in rows]), image_dir, LoadReport()),
    ):
        assert {record.name: record.captions for record in records} == captions
        assert len({record.identity for record in records}) == 2


@pytest.mark.parametrize("letter", ["\u200b", "\u0301", "\ufe0f", "\u3164", "\u2800"])
def test_a_caption_without_a_visible_letter_is_empty(letter):
    report = LoadReport()
    assert clean_captions([letter, f"{letter} {letter}", f"a{letter}"], "0.png", report) == (f"a{letter}",)
    assert report.counts == {"empty caption": 2}


def test_jsonl_with_own_columns_and_relative_paths(tmp_path, image_dir):
    path = write(image_dir / "t.jsonl", '{"file": "0.png", "text": ["a", "b"]}\n\n{"file": "1.png", "text": "cc"}\n')
    records = load_table(path, None, LoadReport(), image_column="file", caption_column="text")
    assert [r.captions for r in records] == [("a", "b"), ("cc",)] and records[0].image == image_dir / "0.png"


def test_table_refuses(tmp_path, image_dir):
    def fails(match, path, **options):
        with pytest.raises(DataError, match=match) as caught:
            load_table(path, image_dir, LoadReport(), **options)
        assert "\n" not in str(caught.value)

    good = table(tmp_path / "t.csv", [("0.png", "a", "train")])
    fails("no column 'text'; it has image, caption, split", good, caption_column="text")
    fails("no column 'path'", good, image_column="path")
    fails("no split 'val' in column 'split'; it has train", good, split="val")
    fails("no column 'fold'", good, split="train", split_column="fold")
    fails("No such file", tmp_path / "none.csv")
    fails("a table ends in", write(tmp_path / "t.xlsx", "x"))
    fails("row 1 has more cells", write(tmp_path / "u.csv", "image,caption\n0.png,a cat, asleep\n"))
    fails("line 2 is not valid JSON", write(tmp_path / "b.jsonl", '{"image": "0.png", "caption": "a"}\n{\n'))
    fails("line 1 is not a JSON object", write(tmp_path / "c.jsonl", "[1]\n"))
    (tmp_path / "latin.csv").write_bytes("image,caption\n0.png,caf\xe9\n".encode("latin-1"))
    fails("not UTF-8", tmp_path / "latin.csv")


def test_report_check_and_summary():
    report = LoadReport(captions=18)
    for index in range(7):
        report.skip("empty caption", f"{index}.jpg")
    assert "7 x empty caption (0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg, ...)" in report.summary()
    report.check(0.28)
    with pytest.raises(DataError, match="7 of 25 .*allowed fraction 0.2"):
        report.check(0.2)
    report.check(0.2, seen=100)


def test_a_file_is_one_image_however_its_path_is_spelled(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(b"y")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names = ["photos/a.jpg", "photos/../photos/a.jpg", f"../{tmp_path.name}/photos/a.jpg", f"{tmp_path}/photos/a.jpg"]
    names += ["b.jpg", "photos/../b.jpg", "link/../b.jpg", "./b.jpg", "../no/such/../b.jpg", "a\0/../b.jpg"]
    rows = [Row(image=name, captions=f"text {i}", identity=name) for i, name in enumerate(names)]
    report = LoadReport()
    records = group_rows(rows, source="t.csv", images=".", split=None, report=report)
    found = {record.name: record.captions for record in records}
    # `link/..` is the folder that holds elsewhere/, so it happens to be this folder too.
    assert found["photos/a.jpg"] == tuple(f"text {i}" for i in range(4))
    assert found["b.jpg"] == tuple(f"text {i}" for i in range(4, 8))
    assert len(records) == 4 and len({record.identity for record in records}) == 4


def test_a_file_of_karpathy_or_of_two_lists_is_one_image_however_it_is_spelled(tmp_path):
    for name in ("im/0.jpg", "im/1.jpg", "im/lists/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    spelled = ["0.jpg", "../im/0.jpg", "./0.jpg", "1.jpg"]
    entries = [
        {"filename": name, "split": "test", "imgid": number, "sentences": [{"raw": f"text {number}"}]}
        for number, name in enumerate(spelled)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": entries}))
    records = load_karpathy(tmp_path / "k.json", tmp_path / "im", "test", LoadReport())
    assert [record.captions for record in records] == [("text 0", "text 1", "text 2"), ("text 3",)]
    paths = []
    for place, image in (("im/a.json", "0.jpg"), ("im/lists/b.json", "../0.jpg"), ("c.json", "im/1.jpg")):
        (tmp_path / place).write_text(json.dumps([{"image": image, "caption": f"of {place}"}]))
        paths.append(str(tmp_path / place))
    joined = load_records(DataOptions(albef=paths, val_fraction=0.0), "train", LoadReport())
    assert [record.captions for record in joined] == [("of im/a.json", "of im/lists/b.json"), ("of c.json",)]


def test_a_byte_order_mark_before_a_caption_is_none_of_its_letters():
    assert clean_captions(["\ufeffa dog\r\n", "a\ufeff b"], "0.txt", LoadReport()) == ("a dog", "a\ufeff b")

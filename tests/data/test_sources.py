"""load_records: the options choose the source, and say so clearly when they cannot."""

import json
from pathlib import Path

import datasets
import jsonargparse
import pytest

from loopitr.data import DataError, DataOptions, HubStream, LoadReport, SceneRecords, load_records


def load(wanted="train", report=None, **options):
    return load_records(DataOptions(**options), wanted, report or LoadReport())


def fails(match, wanted="train", **options):
    with pytest.raises(DataError, match=match) as caught:
        load(wanted, **options)
    assert "\n" not in str(caught.value)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_no_source_is_an_error():
    fails("no data source is given: give one of data.karpathy, .*, or --data.scenes true")
    fails("no data source is given", "val", limit=3)


def test_options_that_belong_to_another_source_are_not_ignored():
    for name in ("images", "val_table", "val_albef", "hub_name", "data_files", "image_column", "caption_column"):
        fails(f"data.{name} is given, and none of data.karpathy, ", scenes=True, **{name: "x"})
    for name, empty in (("table", ""), ("hub", ""), ("karpathy", ""), ("albef", [])):
        fails(f"data.{name} is empty", **{name: empty})


def test_scenes_without_end_are_refused():
    for changes in ({"scenes_train": 10**12}, {"scenes_image_size": 10**6}):
        fails("at most", scenes=True, **changes)


def test_scenes():
    def load(wanted="train", report=None, **options):
        return load_records(DataOptions(scenes=True, **options), wanted, report)

    report = LoadReport()
    records = load(report=report)
    assert isinstance(records, SceneRecords) and (len(records), report.images, report.captions) == (4000, 4000, 16000)
    assert len(load("val")) == len(load("test")) == 500 and len(load("val", limit=9)) == 9
    assert load("val", scenes_image_size=32)[0].image.size == (32, 32)
    fails("no split 'dev'; it has train, val, test", "dev", scenes=True)
    fails("at most 880; got 1000", "val", scenes=True, scenes_val=1000)
    fails("limit must be at least 1, got 0", scenes=True, limit=0)
    fails("data.shuffle_buffer must be at least 0, got -1", scenes=True, shuffle_buffer=-1)


def test_two_sources_are_refused():
    fails("got data.karpathy and data.table", karpathy="a.json", table="b.csv")


def test_karpathy(tmp_path, image_dir):
    path = write(
        tmp_path / "k.json",
        {
            "images": [
                {
                    "filename": f"{i}.png",
                    "split": "train" if i < 5 else "val",
                    "imgid": i,
                    "sentences": [{"raw": f"c {i}"}],
                }
                for i in range(8)
            ]
        },
    )
    assert len(load(karpathy=path, images=str(image_dir))) == 5
    assert [r.identity for r in load("val", karpathy=path, images=str(image_dir), limit=2)] == [5, 6]
    fails("needs data.images", karpathy=path)
    fails("no split 'test'; it has train, val", "test", karpathy=path, images=str(image_dir))


def test_several_albef_lists_are_one(tmp_path, image_dir):
    first = [{"image": "0.png", "caption": "a", "image_id": 1}, {"image": "1.png", "caption": "b", "image_id": 2}]
    second = [{"image": "1.png", "caption": "bb", "image_id": 1}, {"image": "2.png", "caption": "c", "image_id": 2}]
    paths = []
    for number, rows in enumerate((first, second)):
        paths.append(write(tmp_path / f"{number}.json", rows))
    records = load("train", albef=paths, images=str(image_dir), val_fraction=0.0)
    assert [(Path(str(r.image)).name, r.captions) for r in records] == [
        ("0.png", ("a",)),
        ("1.png", ("b", "bb")),
        ("2.png", ("c",)),
    ]
    assert len({r.identity for r in records}) == 3  # The second list's ids 1 and 2 are other images.
    fails("data.albef is empty", "train", albef=[], images=str(image_dir), val_fraction=0.0)


def test_albef_has_a_validation_file_of_its_own(tmp_path, image_dir):
    train = write(tmp_path / "a.json", [{"image": "0.png", "caption": "a"}])
    val = write(tmp_path / "b.json", [{"image": "1.png", "caption": "b"}])
    options = {"albef": train, "images": str(image_dir), "val_fraction": 0.0}
    assert load(**options)[0].captions == ("a",)
    assert load("val", val_albef=val, **options)[0].captions == ("b",)
    assert load("val", split="val", **options)[0].captions == ("a",)  # recipes/evaluate.py asks so.
    fails("no split 'val': give data.val_albef", "val", **options)
    fails("no split 'test'", "test", val_albef=val, **options)


def test_a_part_is_held_out_where_there_is_no_validation_data(tmp_path, image_dir):
    plain = write(tmp_path / "plain.csv", "image,caption\n" + "".join(f"{i % 8}.png,c{i}\n" for i in range(16)))
    options = {"table": plain, "images": str(image_dir), "val_fraction": 0.4}
    report = LoadReport()
    train, val = load(report=report, **options), load("val", **options)
    assert {r.name for r in train} | {r.name for r in val} == {f"{i}.png" for i in range(8)}
    assert train and val and not {r.name for r in train} & {r.name for r in val}
    assert report.images == len(train) and report.captions == 2 * len(train)
    assert [r.name for r in load("val", **options)] == [r.name for r in val]
    del options["val_fraction"]  # 0.05 by itself: of eight images none, and the error says what to do
    fails("0.05 of 8 images leaves none for validation; give validation data", "val", **options)
    drawn = {"scenes": True, "val_fraction": 0.25, "scenes_train": 400}
    scenes = load("val", **drawn), load(**drawn)
    assert len(scenes[0]) + len(scenes[1]) == 400 and 60 < len(scenes[0]) < 140
    assert scenes[0][0].image.size == (64, 64) and scenes[0][0].captions
    drawn["scenes_train"] = 8000  # Many scenes are in two images.
    held_out, others = ({part.identity(i) for i in range(len(part))} for part in (load("val", **drawn), load(**drawn)))
    assert len(held_out) > 900 and not held_out & others  # What is trained on, in another row too, is not held out.
    fails("val_fraction must be in", scenes=True, val_fraction=1.5)
    fails("streaming", hub=str(image_dir), streaming=True, val_fraction=0.1)


def test_table_follows_its_split_column_or_stands_whole(tmp_path, image_dir):
    options = {"images": str(image_dir), "val_fraction": 0.0}
    both = write(tmp_path / "both.csv", "image,caption,split\n0.png,a,train\n1.png,b,val\n")
    plain = write(tmp_path / "plain.csv", "image,caption\n2.png,c\n3.png,d\n")
    assert [r.name for r in load(table=both, **options)] == ["0.png"]
    assert [r.name for r in load("val", table=both, **options)] == ["1.png"]
    assert [r.name for r in load("val", table=both, val_table=plain, **options)] == ["2.png", "3.png"]
    assert [r.name for r in load(table=plain, **options)] == ["2.png", "3.png"]
    assert [r.name for r in load("test", split="test", table=plain, **options)] == ["2.png", "3.png"]
    fails("give data.val_table", "val", table=plain, **options)
    fails("no split 'test'", "test", table=both, **options)
    fails("no column 'text'", table=plain, caption_column="text", **options)


def test_hub_mapped_and_streamed(tmp_path, image_dir, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    rows = "".join(json.dumps({"file_name": f"{i}.png", "caption": [f"c {i}", f"d {i}"]}) + "\n" for i in range(8))
    write(image_dir / "metadata.jsonl", rows)
    assert len(load(hub=str(image_dir))) == 8 and len(load(hub=str(image_dir), limit=3)) == 3
    stream = load(hub=str(image_dir), streaming=True, limit=3)
    assert isinstance(stream, HubStream) and [len(r.captions) for r in stream] == [2, 2, 2]
    fails("no split 'val'; it has train", "val", hub=str(image_dir))


def test_too_much_skipped_stops(tmp_path, image_dir):
    path = write(tmp_path / "t.csv", "image,caption\n" + "".join(f"{i}.png,{'x' if i else ' '}\n" for i in range(8)))
    fails("2 of 9 items were skipped.*0.png", table=path, images=str(image_dir))
    assert len(load(table=path, images=str(image_dir), max_skipped_fraction=0.3)) == 7


def test_options_are_read_by_jsonargparse(tmp_path):
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--data", type=DataOptions, default=DataOptions())
    config = parser.parse_args(
        [
            "--data.hub",
            "webdataset",
            "--data.data_files",
            '{"train": "a-*.tar", "val": "b.tar"}',
            "--data.captions",
            "all",
            "--data.limit",
            "5",
        ]
    )
    # This is its name before version 4.49.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    options = instantiate(config).data
    assert options == DataOptions(
        hub="webdataset", data_files={"train": "a-*.tar", "val": "b.tar"}, captions="all", limit=5
    )
    assert parser.parse_args(["--data.data_files", "a.tar"]).data.data_files == "a.tar"
    assert parser.parse_args(["--data.data_files", '["a", "b"]']).data.data_files == ["a", "b"]


def test_a_report_is_optional():
    assert len(load_records(DataOptions(scenes=True, limit=3), "train")) == 3
    assert len(load_records(DataOptions(scenes=True, scenes_train=100, val_fraction=0.5), "val")) > 10

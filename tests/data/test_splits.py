"""What an evaluation is about: all of a file without splits, or what a run held out of the file that it trained on."""

import json
import os
import shutil

import pytest
import yaml
from helpers.tiny_gallery import jpeg

from loopitr.data import DataError, DataOptions, load_evaluated, load_records, trained_data, training_overlap
from loopitr.data.description import describe_records


def write_images(folder, count, first=0):
    folder.mkdir(exist_ok=True)
    for i in range(first, first + count):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))


@pytest.fixture
def table(tmp_path):
    """`train.csv` of images 0 to 39 and `test.csv` of images 40 to 59, neither with splits."""
    write_images(tmp_path / "images", 60)
    for name, numbers in (("train", range(40)), ("test", range(40, 60))):
        rows = "".join(f"{i}.jpg,caption {i}\n" for i in numbers)
        (tmp_path / f"{name}.csv").write_text("image,caption\n" + rows)
    return tmp_path


def write_run(folder, data, init=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init": init}, "data": data}))
    return folder


def options(folder, name="train", **changes):
    return DataOptions(**{"table": str(folder / f"{name}.csv"), "images": str(folder / "images"), **changes})


def names(records):
    return [record.name for record in records]


@pytest.mark.parametrize("split", ["test", "val", "train", "dev"])
def test_a_separate_test_file_is_evaluated_whole(table, split):
    run = options(table)
    for trained_on in (None, run):
        evaluated = load_evaluated(options(table, "test", split=split), trained_on=trained_on)
        assert names(evaluated.records) == [f"{i}.jpg" for i in range(40, 60)] and evaluated.note is None


def test_an_albef_list_is_evaluated_whole(table):
    path = table / "test.json"
    path.write_text(json.dumps([{"image": f"{i}.jpg", "caption": "a"} for i in range(40, 60)]))
    given = DataOptions(albef=str(path), images=str(table / "images"), split="test")
    assert len(load_evaluated(given).records) == 20
    both = DataOptions(albef=[str(path), str(path)], images=given.images, split="test")
    assert len(load_evaluated(both).records) == 20


@pytest.mark.parametrize("changes", [{}, {"val_fraction": 0.3}, {"limit": 2}, {"split": "all", "val_split": "kept"}])
def test_of_the_table_that_a_run_was_trained_on_exactly_what_it_held_out_is_evaluated(table, changes):
    run = options(table, **changes)
    expected = names(load_records(run, run.val_split))
    assert 0 < len(expected) < 40
    copy = table / "copy.csv"
    shutil.copy(table / "train.csv", copy)
    for name in ("train", "copy"):
        evaluated = load_evaluated(options(table, name, split="test"), trained_on=run)
        assert names(evaluated.records) == expected
        assert f"this run was trained on it; these are the {len(expected)} images" in str(evaluated.note)
        assert "\n" not in str(evaluated.note)
    trained = load_evaluated(options(table, split=run.split), trained_on=run)
    assert names(trained.records) == names(load_records(run, run.split))
    assert "a training uses" in str(trained.note)


def test_one_list_of_several_that_were_trained_on(table):
    paths = []
    for number, rows in enumerate((range(30), range(30, 60))):
        paths.append(str(table / f"{number}.json"))
        content = [{"image": f"{i}.jpg", "caption": "a"} for i in rows]
        (table / f"{number}.json").write_text(json.dumps(content))
    run = DataOptions(albef=paths, images=str(table / "images"), val_fraction=0.3)
    evaluated = load_evaluated(DataOptions(albef=paths[1], images=run.images, split="test"), trained_on=run)
    held_out = {name for name in names(load_records(run, "val")) if int(name.split(".")[0]) >= 30}
    assert set(names(evaluated.records)) == held_out and held_out


def test_a_fraction_that_is_given_names_the_held_out_part(table):
    given = options(table, split="test", val_fraction=0.3)
    expected = names(load_records(options(table, val_fraction=0.3), "val"))
    assert names(load_evaluated(given).records) == expected
    assert names(load_evaluated(options(table, split="test", val_fraction=0.0)).records) == [
        f"{i}.jpg" for i in range(40)
    ]


def test_where_the_file_has_splits_these_are_followed(table):
    rows = "".join(f"{i}.jpg,c,{'test' if i < 5 else 'train'}\n" for i in range(20))
    (table / "split.csv").write_text("image,caption,split\n" + rows)
    run = options(table, "split", val_fraction=0.3)
    evaluated = load_evaluated(options(table, "split", split="test"), trained_on=run)
    assert names(evaluated.records) == [f"{i}.jpg" for i in range(5)] and evaluated.note is None
    held_out = load_evaluated(options(table, "split", split="val"), trained_on=run)  # it has no such split of its own
    assert names(held_out.records) == names(load_records(run, "val")) and held_out.note is not None
    with pytest.raises(DataError, match="no split 'dev'"):
        load_evaluated(options(table, "split", split="dev"), trained_on=run)


def test_without_a_source_the_scenes_of_a_run_on_scenes_are_meant(table):
    run = DataOptions(scenes=True, scenes_train=64)
    evaluated = load_evaluated(DataOptions(split="test", limit=3), trained_on=run)
    assert names(evaluated.records) == [f"scenes-seed0-64px/test/{i}" for i in range(3)]
    assert evaluated.note == "no data source is given: these are the scenes of the run"
    older = write_run(table / "older", {"scenes_train": 64})  # a run from before the option
    assert trained_data(older)[0].data == run
    for other in (None, options(table), DataOptions()):
        with pytest.raises(DataError, match="no data source is given"):
            load_evaluated(DataOptions(split="test"), trained_on=other)


def test_the_options_of_a_run_are_found_again_from_another_place(table, monkeypatch):
    run = write_run(table / "runs" / "x", {"table": "train.csv", "images": "images", "an_older_option": 1})
    monkeypatch.chdir(table.parent)
    (history,) = trained_data(run)
    assert history.data is not None and os.path.samefile(str(history.data.table), table / "train.csv")
    assert len(load_records(history.data, "train")) < 40
    assert trained_data(run / "best")[0].data == history.data


def test_trained_images_are_named_whatever_they_are_called(table):
    run = write_run(table / "run", {"table": str(table / "train.csv"), "images": str(table / "images")})
    trained = names(load_records(options(table), "train"))
    (table / "other").mkdir()
    shutil.copy(table / "images" / trained[3], table / "other" / "new.jpg")
    shutil.copy(table / "images" / "41.jpg", table / "other" / "41.jpg")
    (table / "other.csv").write_text("image,caption\nnew.jpg,a\n41.jpg,b\n")
    records = load_evaluated(options(table, "other", images=str(table / "other"))).records
    overlap = training_overlap(records, trained_data(run))
    assert [(image.name, image.other) for image in overlap.shared] == [("new.jpg", trained[3])]
    assert overlap.unknown is None and overlap.line() == "warning: 1 of the 2 images were trained on: new.jpg"
    assert overlap.to_json() == {"count": 1, "images": ["new.jpg"], "unknown": None}
    held_out = load_evaluated(options(table, split="test"), trained_on=options(table)).records
    clean = training_overlap(held_out, trained_data(run))
    assert clean.line() == (
        f"the model was trained on none of the {len(held_out)} images (files are compared, not pictures)"
    )


def test_the_data_of_the_run_that_a_model_started_from_count_too(table):
    first = write_run(table / "first", {"table": str(table / "test.csv"), "images": str(table / "images")})
    second = {"table": str(table / "train.csv"), "images": str(table / "images")}
    run = write_run(table / "second", second, init=str(first))
    seen = names(load_records(options(table, "test"), "train"))
    evaluated = load_evaluated(options(table, "test", split="test")).records
    overlap = training_overlap(evaluated, trained_data(run))
    assert [image.name for image in overlap.shared] == seen and overlap.unknown is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"table": "/gone/train.csv"}, "/gone/train.csv"),
        ({"hub": "webdataset", "streaming": True}, "trained on a stream"),
        ({"hub": "webdataset", "data_files": {"train": "https://x.invalid/a.tar"}}, "nothing is downloaded"),
        ({"table": "~nobody-of-that-name/train.csv"}, "~nobody-of-that-name/train.csv"),
        ({"table": "a\0b.csv"}, "null byte"),
        ({"table": ["a.csv"]}, r"data.table is ['a.csv']"),
        ({"scenes": True, "limit": "many"}, "data.limit is 'many'"),
        ({"scenes": True, "scenes_train": 10**12}, "must be at most"),
        (None, "cannot be read"),
    ],
)
def test_what_is_not_known_is_said(table, data, reason):
    run = write_run(table / "run", data)
    records = load_evaluated(options(table, "test", split="test")).records
    line = training_overlap(records, trained_data(run)).line()
    assert (
        line.startswith("warning: whether the model was trained on any of these images is unknown") and reason in line
    )
    nowhere = training_overlap(records, trained_data(table / "images"))
    assert "images are not recorded (it has no config.yaml)" in nowhere.line()


def test_training_images_that_are_gone_leave_it_open(table):
    run = write_run(table / "run", {"table": str(table / "train.csv"), "images": str(table / "images")})
    gone = names(load_records(options(table), "train"))[-1]
    (table / "images" / gone).unlink()
    records = load_evaluated(options(table, "test", split="test")).records
    assert (
        f"1 of {len(load_records(options(table), 'train'))} training images are not here"
        in training_overlap(records, trained_data(run)).line()
    )


def changed(table, data, described):
    """What is said of `test.csv` by a run on `data`, which had the description `described`."""
    run = write_run(table / "run", data)
    (run / "data.json").write_text(json.dumps({"train": described}))
    records = load_evaluated(options(table, "test", split="test")).records
    overlap = training_overlap(records, trained_data(run))
    (run / "config.yaml").unlink()
    (run / "data.json").unlink()
    run.rmdir()
    return overlap


def test_a_table_that_has_changed_since_leaves_it_open(table):
    path = table / "train.csv"
    data = {"table": str(path), "images": str(table / "images"), "val_fraction": 0.0}
    described = describe_records(load_records(DataOptions(**data), "train"))
    header, *rows = path.read_text().splitlines()
    for lines, change in (
        (rows, None),
        (rows[::-1], None),
        (rows[5:], "40 images and 40 captions -> 35 images and 35 captions"),
        ([row.replace("caption", "picture") for row in rows], "with other names or texts"),
    ):
        path.write_text("\n".join([header, *lines]) + "\n")
        overlap = changed(table, data, described)
        assert overlap.shared == [] and (overlap.unknown is None) == (change is None)
        assert change is None or change in overlap.line()
    (table / "images" / "7.jpg").write_bytes(b"another image")
    for lines, named in ((rows, ", the first is 7.jpg"), (rows[::-1], "bytes)")):
        path.write_text("\n".join([header, *lines]) + "\n")
        overlap = changed(table, data, described)
        assert "1 of 40 images are other files" in str(overlap.unknown) and f"{named})" in str(overlap.unknown)
    for damaged in (None, [], {}, "x"):
        assert changed(table, data, damaged).unknown is None or damaged == {}


def test_shared_images_are_named_although_others_are_gone(table):
    run = write_run(table / "run", {"table": str(table / "train.csv"), "images": str(table / "images")})
    trained = names(load_records(options(table), "train"))
    shutil.copy(table / "images" / trained[0], table / "images" / "40.jpg")
    (table / "images" / trained[-1]).unlink()
    records = load_evaluated(options(table, "test", split="test")).records
    overlap = training_overlap(records, trained_data(run))
    assert [image.name for image in overlap.shared] == ["40.jpg"] and "are not here" in str(overlap.unknown)


def test_a_config_that_cannot_be_read_is_named(table):
    records = load_evaluated(options(table, "test", split="test")).records
    run = write_run(table / "run", {})
    for text in ("[" * 5000, "data: &a {b: *a}", "data: !!python/object/apply:os.getcwd []", "\0", "data: 2024-13-45"):
        (run / "config.yaml").write_text(text)
        line = training_overlap(records, trained_data(run)).line()
        assert "is unknown" in line and f"{run}/config.yaml" in line and "\n" not in line

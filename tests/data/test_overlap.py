"""Images of one data set that are in another too are found by content, whatever they are called."""

import os

from PIL import Image

from loopitr.data import Record, SceneRecords, shared_images


def record(image, name=None):
    return Record(image=image, captions=("x",), name=name)


def pairs(records, others):
    return [(image.name, image.other) for image in shared_images(records, others)]


def test_a_copy_under_another_name_is_found_and_an_image_of_equal_size_is_not(tmp_path, image_dir):
    copy = tmp_path / "copy.png"
    copy.write_bytes((image_dir / "3.png").read_bytes())
    twin = tmp_path / "twin.png"
    twin.write_bytes(bytes(reversed(copy.read_bytes())))  # as long as the copy
    held_out = [record(copy, "copy"), record(twin, "twin"), record(str(copy), "again")]
    assert pairs(held_out, [record(image_dir / f"{i}.png", str(i)) for i in range(8)]) == [
        ("copy", "3"),
        ("again", "3"),
    ]
    assert pairs(held_out[1:2], held_out[:1]) == []


def test_bytes_equal_a_file_of_that_content_and_pictures_equal_pictures(image_dir):
    data = (image_dir / "1.png").read_bytes()
    assert pairs([record(data, "bytes")], [record(image_dir / "1.png", "file")]) == [("bytes", "file")]
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    assert pairs([record(red, "red"), record(blue, "blue")], [record(red.copy(), "other red")]) == [
        ("red", "other red")
    ]
    assert pairs([record(red.convert("L"), "grey")], [record(red, "red")]) == []


def test_missing_empty_and_endless_files_match_nothing(tmp_path):
    for name in ("empty", "also empty"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe")
    others = [record(tmp_path / name) for name in ("empty", "also empty", "gone", "pipe")]
    assert pairs([*others, record("nul\0byte", "nul")], [*others, record("nul\0byte")]) == []


def test_splits_of_the_scenes_are_told_apart_without_rendering(monkeypatch):
    train, val = SceneRecords("train", 8), SceneRecords("val", 8)
    assert len(pairs(train, train)) == 8
    monkeypatch.setattr(SceneRecords, "read", None)
    assert pairs(val, train) == []

"""Data of `datasets` with a row per caption, and which of their images are held out."""

import json
import shutil
from dataclasses import replace

import datasets
import pytest
from helpers.local_datasets import make_parquet, png

from loopitr.data import DataOptions, LoadReport, captions_of, load_evaluated, load_records
from loopitr.evaluation.gallery import distinct_images


@pytest.fixture(autouse=True)
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def rows_per_caption(folder, images=6, per_image=3):
    """A table that repeats each image for each of its captions, in rounds."""
    folder.mkdir()
    rows = [
        ({"bytes": png(number), "path": None}, f"text {turn} of {number}")
        for turn in range(per_image)
        for number in range(images)
    ]
    make_parquet(folder / "train.parquet", rows)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_gallery_has_each_image_once(tmp_path, streaming):
    options = DataOptions(hub=str(rows_per_caption(tmp_path / "rows")), streaming=streaming, limit=100)
    records = load_evaluated(options).records
    images = distinct_images(records, len(records))
    texts = [[caption for position in image for caption in captions_of(records, position)] for image in images]
    assert texts == [[f"text {turn} of {number}" for turn in range(3)] for number in range(6)]


def test_what_is_held_out_depends_on_the_images_and_not_on_where_they_are(tmp_path, monkeypatch):
    folder = rows_per_caption(tmp_path / "rows", images=20)
    options = DataOptions(hub=str(folder), val_fraction=0.4)
    parts = [
        {captions_of(part, i)[0].split(" of ")[1] for i in range(len(part))}
        for part in (load_records(options, split, LoadReport()) for split in ("train", "val"))
    ]
    assert len(parts[0] | parts[1]) == 20 and not parts[0] & parts[1]  # All rows of an image are on one side.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "moved")
    for spelling in ("rows", "./rows/", str(tmp_path / "moved")):
        held = load_evaluated(replace(options, hub=spelling, split="val"), trained_on=replace(options, hub=spelling))
        assert {name.split(" of ")[1] for record in held.records for name in record.captions} == parts[1]


def test_an_image_folder_is_divided_by_the_names_in_it(tmp_path):
    parts = []
    for place in ("here", "there/and/deeper"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for number in range(12):
            (folder / f"{number}.png").write_bytes(png(number))
        lines = [json.dumps({"file_name": f"{number}.png", "text": f"image {number}"}) for number in range(12)]
        (folder / "metadata.jsonl").write_text("\n".join(lines[:: 1 if place == "here" else -1]))
        records = load_records(DataOptions(hub=str(folder), val_fraction=0.5), "val", LoadReport())
        parts.append({record.captions for record in records})
    assert parts[0] == parts[1] and 0 < len(parts[0]) < 12

"""Captions that are a text in one row and a list of texts in another keep their words, whatever holds them."""

import io
import json
import tarfile

import pytest
from helpers.tiny_gallery import jpeg

from loopitr.data import DataOptions, LoadReport, load_records

TEXTS, LISTS = ["a dog", "a cat on a mat"], [["two cats", "cats"], ["one bird"]]


@pytest.fixture(autouse=True)
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def expected(captions):
    return [(caption,) if isinstance(caption, str) else tuple(caption) for caption in captions]


def write_tar(path, captions, first):
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions, start=first):
            for name, data in ((f"{number}.jpg", jpeg(number)), (f"{number}.json", caption)):
                content = data if isinstance(data, bytes) else json.dumps({"caption": data, "id": number}).encode()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("parts", [(TEXTS, LISTS), (LISTS, TEXTS)], ids=["texts first", "lists first"])
def test_in_tars(tmp_path, parts, streaming):
    """`datasets` takes the types from the first tar, and made letters of a text, or a text of a list."""
    for number, captions in enumerate(parts):
        write_tar(tmp_path / f"{number}.tar", captions, first=2 * number)
    files = {"train": [str(tmp_path / f"{number}.tar") for number in range(2)]}
    for column in (None, "json.caption"):
        report = LoadReport()
        options = DataOptions(hub="webdataset", data_files=files, caption_column=column, streaming=streaming)
        records = list(load_records(options, "train", report))
        assert [record.captions for record in records] == expected([*parts[0], *parts[1]])
        assert report.skipped == 0 and [record.image for record in records] == [jpeg(i) for i in range(4)]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "albef"])
def test_in_one_file(tmp_path, suffix):
    captions = [TEXTS[0], LISTS[0], TEXTS[1], LISTS[1]]
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    rows = [{"image": f"{number}.jpg", "caption": caption} for number, caption in enumerate(captions)]
    if suffix == "albef":
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        options = DataOptions(albef=str(tmp_path / "rows.json"), val_fraction=0.0)
    else:
        lines = [json.dumps(row) for row in rows]
        if suffix == "csv":  # lists as JSON and as pandas writes them
            cells = [TEXTS[0], json.dumps(LISTS[0]), TEXTS[1], str(LISTS[1])]
            quoted = [cell.replace('"', '""') for cell in cells]
            lines = ["image,caption", *(f'{number}.jpg,"{cell}"' for number, cell in enumerate(quoted))]
        (tmp_path / f"rows.{suffix}").write_text("\n".join(lines) + "\n")
        options = DataOptions(table=str(tmp_path / f"rows.{suffix}"), val_fraction=0.0)
    assert [record.captions for record in load_records(options, "train")] == expected(captions)


def test_a_caption_that_only_starts_like_a_list_stays_a_text(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    for caption in ("[blurred] a dog", "[1, 2]", "['a', 2]", "[" * 200):
        (tmp_path / "rows.csv").write_text(f'image,caption\n0.jpg,"{caption}"\n')
        (record,) = load_records(DataOptions(table=str(tmp_path / "rows.csv"), val_fraction=0.0), "train")
        assert record.captions == (caption,)


def test_a_list_as_numpy_writes_it(tmp_path):
    """Without commas; Python reads texts that follow each other as one."""
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    for cell in ("['a dog, sat' 'dogs']", "['a dog, sat'\n 'dogs']", "['a dog, sat', 'dogs']"):
        (tmp_path / "rows.csv").write_text(f'image,caption\n0.jpg,"{cell}"\n')
        (record,) = load_records(DataOptions(table=str(tmp_path / "rows.csv"), val_fraction=0.0), "train")
        assert record.captions == ("a dog, sat", "dogs")

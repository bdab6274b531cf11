"""That images of a source of `datasets` were replaced shows by their sizes: files, rows of tables, tars of a stream."""

import io
import tarfile

import datasets
import pytest
from helpers.tiny_gallery import jpeg

from loopitr.data import LoadReport, SceneRecords, images_digest, load_hub
from loopitr.data.description import describe_records, difference
from loopitr.data.subset import Subset


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def write_tar(path, contents):
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(contents):
            for name, data in ((f"{number}.jpg", content), (f"{number}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def tars(path, streaming=False):
    return load_hub("webdataset", "train", LoadReport(), data_files=str(path / "*.tar"), streaming=streaming)


def test_a_file_of_an_image_folder(tmp_path):
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{n}.jpg,a caption\n" for n in range(4)))
    records = load_hub(str(tmp_path / "set"), "train", LoadReport())
    part = Subset(records, [2, 1])
    before = describe_records(records), describe_records(part)
    digests = images_digest(records), images_digest(part)
    assert records.image_sizes().tolist() == [len(jpeg(number)) for number in range(4)]
    (folder / "2.jpg").write_bytes(jpeg(3) + b"x")
    assert images_digest(records) != digests[0] and images_digest(part) != digests[1]
    for old, changed, count in zip(before, (records, part), (4, 2), strict=True):
        line = difference(old, describe_records(changed), changed)
        assert line.startswith(f"1 of {count} images are other files") and line.endswith("2.jpg")


def test_images_in_a_tar(tmp_path):
    write_tar(tmp_path / "0.tar", [jpeg(number) for number in range(3)])
    records = tars(tmp_path)
    assert records.image_sizes().tolist() == [len(jpeg(number)) for number in range(3)]
    before, digest = describe_records(records), images_digest(records)
    write_tar(tmp_path / "0.tar", [jpeg(0), jpeg(1) + b"x", jpeg(2)])
    records = tars(tmp_path)
    assert images_digest(records) != digest
    assert difference(before, describe_records(records), records).endswith("the first is " + records.name(1))


def test_the_tars_of_a_stream(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [jpeg(number)])
    before = describe_records(tars(tmp_path, streaming=True))
    assert before["files"] == 2 and difference(before, before, tars(tmp_path, streaming=True)) is None
    write_tar(tmp_path / "1.tar", [jpeg(1) + bytes(20_000)])
    stream = tars(tmp_path, streaming=True)
    size = before["bytes"]
    assert difference(before, describe_records(stream), stream).startswith(f"2 files and {size} bytes -> 2 files and ")
    write_tar(tmp_path / "2.tar", [jpeg(2)])
    stream = tars(tmp_path, streaming=True)
    assert "-> 3 files" in difference(before, describe_records(stream), stream)
    assert difference(None, describe_records(stream), stream) is None  # an older run's


def test_scenes_have_no_files():
    assert "sizes" not in describe_records(SceneRecords("val", 4))

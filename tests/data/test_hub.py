"""load_hub on local files: imagefolder, parquet, WebDataset tars; mapped and streamed; what it skips and refuses."""

import io
import json
import pickle
import tarfile
from itertools import chain
from pathlib import Path

import datasets
import pytest
from helpers.local_datasets import make_parquet, png

from loopitr.data import (
    DataError,
    HubRecords,
    HubStream,
    LoadReport,
    decode_image,
    load_hub,
)

FLICKR = Path(__file__).parents[3] / "shared" / "flickr8k" / "dev-00000.tar"


@pytest.fixture(autouse=True)
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_tars(folder, shards=2, per_shard=3):
    folder.mkdir()
    for shard in range(shards):
        samples = []
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            captions = [f"caption {number}", f"again {number}", " "]
            samples += [
                (f"{number:03d}.jpg", png(number)),
                (f"{number:03d}.json", json.dumps({"captions": captions}).encode()),
            ]
        write_tar(folder / f"train-{shard:05d}.tar", samples)
    return folder


def embedded(value, path):
    return {"bytes": png(value), "path": path}


@pytest.mark.parametrize("streaming", [False, True])
def test_imagefolder_with_metadata(tmp_path, image_dir, streaming):
    train = tmp_path / "set" / "train"
    train.parent.mkdir()
    image_dir.rename(train)
    rows = "".join(f'{index}.png,"picture, number {index}"\n' for index in range(8))
    (train / "metadata.csv").write_text("file_name,text\n" + rows)
    records = list(load_hub(str(train.parent), "train", LoadReport(), streaming=streaming))
    assert sorted(record.captions for record in records) == [(f"picture, number {i}",) for i in range(8)]
    for record in records:  # The image belongs to its caption, and is not decoded yet.
        assert Path(record.image).name == f"{record.captions[0][-1]}.png" and record.name == record.image
    assert len({record.identity for record in records}) == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_json_captions_are_guessed(tmp_path, streaming):
    report = LoadReport()
    source = load_hub(str(make_tars(tmp_path / "tars")), "train", report, streaming=streaming)
    assert isinstance(source, HubStream if streaming else HubRecords)
    records = list(source)
    assert [r.captions for r in records] == [(f"caption {i}", f"again {i}") for i in range(6)]
    assert decode_image(records[5].image).getpixel((0, 0)) == (5, 0, 0) and isinstance(records[0].image, bytes)
    assert records[4].name.endswith("train-00001.tar::004")
    assert report.counts == {"empty caption": 6} and (report.images, report.captions) == (6, 12)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_lists_strings_and_repeated_images(tmp_path, streaming):
    rows = [(embedded(i % 3 * 80, f"{i % 3}.png"), [f"c{i}", f"d{i}"]) for i in range(6)]
    path = make_parquet(tmp_path / "x.parquet", rows)
    records = list(load_hub("parquet", "train", LoadReport(), data_files=path, streaming=streaming))
    assert records[1].captions == ("c1", "d1")
    ids = [r.identity for r in records]
    assert ids[:3] == ids[3:] and len(set(ids)) == 3
    path = make_parquet(tmp_path / "y.parquet", [(embedded(0, None), "a whole caption")], caption="text")
    records = list(load_hub("parquet", "train", LoadReport(), data_files=path, streaming=streaming))
    assert records[0].captions == ("a whole caption",)


@pytest.mark.parametrize("streaming", [False, True])
def test_stored_images_are_the_same_if_their_bytes_are(tmp_path, streaming):
    """A table often repeats an image for each of its captions, without a path or with one that says nothing."""
    black, other = png(0), png(0)[:-1] + b"x"  # of the same size
    images = [(black, "0.png"), (other, "0.png"), (png(200), None), (black, None), (other, "1.png"), (black, "")]
    rows = [({"bytes": data, "path": path}, f"caption {number}") for number, (data, path) in enumerate(images)]
    path = make_parquet(tmp_path / "x.parquet", rows)
    records = list(load_hub("parquet", "train", LoadReport(), data_files=path, streaming=streaming))
    ids = [record.identity for record in records]
    assert ids[0] == ids[3] == ids[5] and ids[1] == ids[4] and len(set(ids)) == 3
    assert streaming or ids == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_image_or_caption_are_counted(tmp_path, streaming):
    rows = [(embedded(0, "a.png"), "fine"), (None, "lost"), (embedded(1, "b.png"), "  "), (embedded(2, "c.png"), None)]
    path = make_parquet(tmp_path / "x.parquet", rows)
    report = LoadReport()
    records = list(load_hub("parquet", "train", report, data_files=path, streaming=streaming))
    assert [r.captions for r in records] == [("fine",)]
    assert report.counts == {"no image": 1, "empty caption": 1, "no captions": 2}


def test_mapped_records_are_lazy_and_survive_pickling(tmp_path):
    rows = [(embedded(0, "bad.png"), " ")] + [(embedded(i, f"{i}.png"), f"c{i}") for i in range(1, 5)]
    path = make_parquet(tmp_path / "x.parquet", rows)
    records = load_hub("parquet", "train", LoadReport(), data_files=path)
    assert len(records) == 4 and len(records.take(2)) == 2
    for index, record in enumerate(records):
        assert records.captions(index) == record.captions and records.name(index) == record.name
        assert records.identity(index) == record.identity == index + 1
        assert records.caption_count(index) == 1
    assert pickle.loads(pickle.dumps(records))[3].captions == ("c4",)
    assert records[-1].captions == records[1:][-1].captions == ("c4",)
    with pytest.raises(IndexError):
        records[4]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_stream_shards_part_the_rows(tmp_path, num_shards, shuffle):
    """Two tars: by file for 2 shards, by row for 3 and 4."""
    stream = load_hub(str(make_tars(tmp_path / "tars")), "train", LoadReport(), streaming=True)
    if shuffle:
        stream = stream.shuffle(seed=5, buffer_size=4)
        stream.set_epoch(3)
    parts = [[r.captions[0] for r in stream.shard(num_shards, i)] for i in range(num_shards)]
    assert sorted(chain.from_iterable(parts)) == [f"caption {i}" for i in range(6)]
    assert min(map(len, parts)) >= 1
    nested = [r.captions[0] for a in range(2) for b in range(2) for r in stream.shard(2, a).shard(2, b)]
    assert sorted(nested) == [f"caption {i}" for i in range(6)]


def test_stream_order_depends_on_epoch_and_take_comes_first(tmp_path):
    stream = load_hub(str(make_tars(tmp_path / "tars")), "train", LoadReport(), streaming=True).shuffle(0, 6)
    orders = []
    for epoch in (0, 1, 2, 0):
        stream.set_epoch(epoch)
        orders.append([r.captions[0] for r in stream])
    assert orders[0] == orders[3] and len({tuple(order) for order in orders}) > 1
    assert sorted(r.captions[0] for r in stream.take(2)) == ["caption 0", "caption 1"]
    assert len([r for i in range(2) for r in stream.take(3).shard(2, i)]) == 3


def fails(match, *args, **options):
    with pytest.raises(DataError, match=match) as caught:
        list(load_hub(*args, LoadReport(), **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_refuses(tmp_path, streaming):
    tars = str(make_tars(tmp_path / "tars"))
    fails("no split 'val'; it has train", tars, "val", streaming=streaming)
    fails(
        r"no caption column 'json.text'; its columns are jpg, json \(fields: captions\)",
        tars,
        "train",
        caption_column="json.text",
        streaming=streaming,
    )
    fails("no image column 'img'", tars, "train", image_column="img", streaming=streaming)
    fails("cannot load it: .*nowhere", str(tmp_path / "nowhere"), "train", streaming=streaming)
    path = tmp_path / "x.parquet"
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "png": datasets.Image(),
            "label": datasets.Value("int64"),
            "sentences": [{"raw": datasets.Value("string")}],
        }
    )
    row = {
        "image": [embedded(0, "a.png")],
        "png": [embedded(1, "a.png")],
        "label": [3],
        "sentences": [[{"raw": "a cat"}, {"raw": "two cats"}]],
    }
    datasets.Dataset.from_dict(row, features=features).to_parquet(str(path))
    options = {"data_files": str(path), "streaming": streaming}
    fails("the image column may be image or png", "parquet", "train", **options)
    fails(r"no caption column found.*sentences \(fields: raw\)", "parquet", "train", image_column="png", **options)
    fails(
        "must be text or a list of texts, got int",
        "parquet",
        "train",
        image_column="png",
        caption_column="label",
        **options,
    )
    fails(
        "must be bytes or a path, got int",
        "parquet",
        "train",
        image_column="label",
        caption_column="sentences.raw",
        **options,
    )
    records = list(
        load_hub("parquet", "train", LoadReport(), image_column="png", caption_column="sentences.raw", **options)
    )
    assert records[0].captions == ("a cat", "two cats")
    (tmp_path / "bad.parquet").write_bytes(b"xx")
    fails(
        r"parquet with data_files /nope/\*.parquet: datasets cannot load it",
        "parquet",
        "train",
        data_files="/nope/*.parquet",
        streaming=streaming,
    )
    fails(
        "(cannot load it|cannot read on)",
        "parquet",
        "train",
        data_files=str(tmp_path / "bad.parquet"),
        streaming=streaming,
    )


def test_no_captions_at_all(tmp_path):
    path = make_parquet(tmp_path / "x.parquet", [(embedded(0, "a.png"), " ")])
    fails("no image with a caption in column 'caption'", "parquet", "train", data_files=path)


@pytest.mark.skipif(not FLICKR.exists(), reason=f"{FLICKR} is not on this machine")
def test_flickr8k_tar():
    options = {"data_files": {"val": str(FLICKR)}}
    report = LoadReport()
    records = load_hub("webdataset", "val", report, **options)
    assert (len(records), report.captions) == (1000, 5000) and len({records.identity(i) for i in range(1000)}) == 1000
    stream = load_hub("webdataset", "val", LoadReport(), streaming=True, **options)
    first = next(iter(stream))
    assert first.captions == records[0].captions and first.image == records[0].image
    assert decode_image(first.image).size == (224, 224)

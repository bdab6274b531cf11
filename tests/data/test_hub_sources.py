"""Short runs on what `datasets.load_dataset` reads: an imagefolder with metadata, and WebDataset tars."""

from __future__ import annotations

import io
import json
import tarfile

import datasets
import pytest
from helpers.tiny_gallery import captions, jpeg
from helpers.tiny_run import logged, run

from loopitr.data import DataError

SIZES = {"train": range(8), "validation": range(8, 12)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def check(tmp_path, **changes):
    metrics = run(tmp_path / "run", **changes, data__val_split="validation", train__batch_size=4, train__max_steps=2)
    assert (metrics["split"], metrics["num_images"], metrics["num_captions"]) == ("validation", 4, 8)
    assert metrics["training"]["steps"] == len(logged(tmp_path / "run", "loss/total")) == 2


@pytest.mark.slow
def test_a_run_on_an_imagefolder_with_metadata(tmp_path):
    """Its folder `val` is the split that `datasets` calls `validation`."""
    for split, numbers in SIZES.items():
        folder = tmp_path / "set" / split[: 3 if split == "validation" else None]
        folder.mkdir(parents=True)
        for i in numbers:
            (folder / f"{i}.jpg").write_bytes(jpeg(i))
        rows = [json.dumps({"file_name": f"{i}.jpg", "captions": list(captions(i, 2))}) for i in numbers]
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    check(tmp_path, data__hub=str(tmp_path / "set"))
    with pytest.raises(DataError, match="no split 'val'; it has train, validation"):
        run(tmp_path / "other", data__hub=str(tmp_path / "set"), data__val_split="val")


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_on_webdataset_tars(tmp_path, streaming):
    for split, numbers in SIZES.items():
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for i in numbers:
                described = json.dumps({"captions": list(captions(i, 2))}).encode()
                for name, data in ((f"{i:03d}.jpg", jpeg(i)), (f"{i:03d}.json", described)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    files = {split: str(tmp_path / f"{split}-*.tar") for split in SIZES}
    check(tmp_path, data__hub="webdataset", data__data_files=files, data__streaming=streaming)

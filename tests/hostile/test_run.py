"""A run on images of which a third is no image: each is counted once, and the rest is learned from."""

import json

import pytest
from helpers.hostile_images import hostile_images
from helpers.tiny_gallery import captions, jpeg
from helpers.tiny_run import run

from loopitr.data import DataError

GOOD = 32
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`data.jsonl`: good images, and after every second one a hostile one."""
    folder = tmp_path_factory.mktemp("run") / "data"
    cases = [case for case in hostile_images(folder / "images") if case.readable is False][::4][:GOOD]
    rows = []
    for number in range(GOOD):
        (folder / "images" / f"good-{number}.jpg").write_bytes(jpeg(number))
        split = "val" if number >= GOOD - 8 else "train"
        rows.append({"image": f"good-{number}.jpg", "caption": captions(number, 2), "split": split})
        if number % 2:
            rows.append({"image": str(cases[number].path), "caption": captions(number, 1), "split": split})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_a_run_counts_what_it_cannot_read(folder, tmp_path):
    changes = {"data__table": str(folder / "data.jsonl"), "data__images": str(folder / "images")}
    changes |= {"data__max_skipped_fraction": 0.6, "train__batch_size": 4, "train__epochs": 2}
    metrics = run(tmp_path / "a", **changes)
    assert sum(metrics["training"]["skipped"].values()) == 12  # of the training images, whatever the epochs
    assert metrics["num_images"] == 8
    cached = run(tmp_path / "b", **changes, data__cache_images=str(tmp_path / "cache"))
    assert sum(cached["training"]["skipped"].values()) == 12
    with pytest.raises(DataError, match="more than the allowed fraction 0.1") as caught:
        run(tmp_path / "d", **{**changes, "data__max_skipped_fraction": 0.1})
    assert str(caught.value).isprintable()

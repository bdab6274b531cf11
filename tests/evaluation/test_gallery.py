"""An image with several records, as where each caption is a row of its own, is one image of the gallery."""

from __future__ import annotations

from dataclasses import replace

import datasets
import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import captions, evaluate, jpeg, picture, tiny_records

from loopitr.data import DataError, LoadReport, Record, load_hub
from loopitr.data.subset import Subset
from loopitr.evaluation.gallery import distinct_images


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_row_per_caption_gives_the_ranks_of_a_row_per_image(in_turn):
    model, records = tiny_model(), tiny_records(5, per_image=3)
    rows = [replace(record, captions=(caption,)) for record in records for caption in record.captions]
    if in_turn:
        rows = [row for number in range(3) for row in rows[number::3]]
    expected, result = (evaluate(model, each, rerank=2, captions_per_image=2) for each in (records, rows))
    assert (result.num_images, result.num_captions, result.num_pairs) == (5, 10, expected.num_pairs)
    for name, ranking in expected.rankings.items():
        assert torch.equal(result.rankings[name].i2t, ranking.i2t)
        assert torch.equal(result.rankings[name].t2i, ranking.t2i)


def test_an_unreadable_image_with_three_rows_is_one_lost_image():
    broken = [Record(image=b"x", captions=(text,), identity=1, name="x.jpg") for text in captions(0, 3)]
    report = LoadReport()
    result = evaluate(tiny_model(), [*tiny_records(3), *broken], report=report, max_skipped_fraction=0.25)
    assert result.num_images == 3 and list(report.counts.values()) == [1]
    with pytest.raises(DataError, match="1 of 4 images cannot be used"):
        evaluate(tiny_model(), [*tiny_records(3), *broken], max_skipped_fraction=0.24)


def test_an_image_is_known_by_its_identity_and_its_content():
    one, path = picture(1), "folder/a.jpg"
    shown = [(one, 7), (one.copy(), 7), (picture(2), 7), (one, 8), (path, 9), (path, 9), (jpeg(3), 5), (jpeg(3), 5)]
    records = [Record(image=image, captions=("x",), identity=identity) for image, identity in shown]
    assert distinct_images(records, len(records)) == [[0, 1], [2], [3], [4, 5], [6, 7]]
    assert distinct_images(records, 5) == [[0, 1], [2], [3], [4]]


def test_rows_of_a_dataset_with_the_same_image(tmp_path):
    images = [{"bytes": jpeg(number // 2), "path": None} for number in range(6)]
    table = datasets.Dataset.from_dict({"image": images, "caption": [*"abcdef"]})
    table.to_parquet(tmp_path / "rows.parquet")
    records = load_hub("parquet", "train", LoadReport(), data_files=str(tmp_path / "rows.parquet"))
    assert distinct_images(records, 6) == [[0, 1], [2, 3], [4, 5]]
    assert distinct_images(Subset(records, [5, 1, 0, 4]), 4) == [[0, 3], [1, 2]]

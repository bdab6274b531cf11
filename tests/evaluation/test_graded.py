"""Graded relevance and paraphrase stability: the ground truth of the scenes, and a case worked out by hand."""

import math
import random
import time
from dataclasses import replace

import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import evaluate, tiny_records

from loopitr.data import DataOptions, LoadReport, SceneRecords, load_records, relevance, relevance_of
from loopitr.data.subset import Subset
from loopitr.evaluation.graded import GradedMetrics, caption_pairs, reranked_first


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_relevance_of_many_scenes_is_that_of_each_two(split):
    records = SceneRecords(split, 400, seed=1)
    positions = random.Random(0).sample(range(400), 60)
    matrix = relevance_of(records, positions)
    expected = [[relevance(records.scene(a), records.scene(b)) for b in positions] for a in positions]
    torch.testing.assert_close(matrix, torch.tensor(expected))
    assert (matrix.diagonal() == 1).all() and matrix.unique().numel() > 3


def test_the_relevance_of_a_whole_split_takes_no_time():
    records = SceneRecords("test", 500)
    begin = time.perf_counter()
    assert records.relevance(range(500)).shape == (500, 500)
    assert time.perf_counter() - begin < 0.5


def test_parts_of_records_keep_their_relevance_and_plain_records_have_none():
    part = load_records(DataOptions(scenes=True, scenes_train=40, val_fraction=0.5), "train", LoadReport())
    assert len(relevance_of(part, range(len(part)))) == len(part)
    assert relevance_of(tiny_records(), [0, 1]) is None


# Images 0 and 1 share 3 of 7 facts; captions 0 and 1 are of image 0, caption 2 of image 1.
RELEVANCE = torch.tensor([[1.0, 3 / 7], [3 / 7, 1.0]])
ROWS = torch.tensor([0, 0, 1])
SCORES = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.4, 0.8]])  # Caption 1 is nearer to image 1.


def test_metrics_of_a_written_out_example():
    metrics = GradedMetrics.from_scores(SCORES, SCORES.T, relevance=RELEVANCE, caption_rows=ROWS)
    second, third, grade = 1 / math.log2(3), 1 / math.log2(4), 3 / 7
    image_0 = (1 + grade * second + third) / (1 + second + grade * third)  # The scores rank in the order 0, 2, 1.
    image_1 = 1  # The scores rank in the order 2, 1, 0.
    assert metrics.ndcg["i2t"] == pytest.approx((image_0 + image_1) / 2)
    caption_1 = (grade + second) / (1 + grade * second)
    assert metrics.ndcg["t2i"] == pytest.approx((1 + caption_1 + 1) / 3)
    assert metrics.map_at_r["i2t"] == pytest.approx((1 / 2 + 1) / 2)
    assert metrics.map_at_r["t2i"] == pytest.approx(2 / 3)
    # Captions 0 and 1 rank the two images the other way round: they share nothing at depth 1, everything at depth 2.
    assert (metrics.overlap, metrics.jaccard) == (0.5, 1.0)
    assert "mAP@R i2t 0.750, t2i 0.667; paraphrases' overlap@10 0.500, Jaccard@10 1.000" in metrics.line()


def test_one_caption_per_image_has_no_paraphrases():
    metrics = GradedMetrics.from_scores(SCORES[:, 1:], SCORES[:, 1:].T, relevance=RELEVANCE, caption_rows=ROWS[1:])
    assert metrics.overlap is metrics.jaccard is None and "paraphrases" not in metrics.line()


def test_every_two_captions_of_an_image_are_a_pair_once():
    first, second = caption_pairs(torch.tensor([0, 0, 0, 1, 2, 2]))
    assert sorted(zip(first.tolist(), second.tolist())) == [(0, 1), (0, 2), (1, 2), (4, 5)]


def test_candidates_come_before_the_rest():
    similarity = torch.tensor([[0.9, 0.8, 0.1, 0.5]])
    ranked = reranked_first(similarity, torch.tensor([[0, 2]]), torch.tensor([[-50.0, -40.0]]))
    assert ranked.argsort(descending=True).tolist() == [[2, 0, 1, 3]]


def test_an_evaluation_of_scenes_reports_them():
    records = SceneRecords("test", 24, image_size=32)
    result = evaluate(tiny_model(), records, rerank=4, max_images=20)
    json, lines = result.to_json()["graded"], result.table().splitlines()
    assert [*json] == ["dual", "match", "match_plus_similarity", "reranked"]
    for name, head in (("dual", "dual"), ("match", "match"), ("match_plus_similarity", "match + similarity")):
        assert json[name].keys() == {"ndcg10", "map_at_r", "paraphrase_overlap10", "paraphrase_jaccard10"}
        assert 0 < json[name]["ndcg10"]["t2i"] < 1
        # Here a caption has one image of its own scene.
        assert 100 * json[name]["map_at_r"]["t2i"] == pytest.approx(result.rankings[name].metrics()["t2i"]["r1"])
        assert f"- {head}: {result.graded[name].line()}" in lines
    assert (
        evaluate(tiny_model(), records, rerank=24 * 4).graded["match"].ndcg
        != evaluate(tiny_model(), records, rerank=0).graded["dual"].ndcg
    )


def test_only_ground_truth_is_reported_and_only_where_it_is_asked_for():
    for result in (
        evaluate(tiny_model(), tiny_records(), rerank=0),
        evaluate(tiny_model(), SceneRecords("test", 8), rerank=0, graded=False),
    ):
        assert result.graded == {} and "graded" not in result.to_json() and "nDCG" not in result.table()


class OneBroken(SceneRecords):
    def read(self, index):
        record = super().read(index)
        return replace(record, image=b"no image") if index == 3 else record


def test_an_unreadable_image_is_left_out():
    scenes = OneBroken("test", 12, image_size=32)
    readable = Subset(scenes, [index for index in range(12) if index != 3])
    result = evaluate(tiny_model(), scenes, rerank=2, max_skipped_fraction=0.1)
    assert result.num_images == 11 and result.graded == evaluate(tiny_model(), readable, rerank=2).graded

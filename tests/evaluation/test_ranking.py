import math

import pytest
import torch
from torch.nn.functional import pad

from loopitr.evaluation import ranking as ranking_module
from loopitr.evaluation.ranking import (
    Ranking,
    candidate_ranks,
    jaccard_at_k,
    mean_average_precision_at_r,
    ndcg,
    overlap_at_k,
    recall_at_k,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gallery(seed, images=7, captions=20, ties=False):
    generator = seeded(seed)
    owner = torch.cat([torch.arange(images), torch.randint(0, images, (captions - images,), generator=generator)])
    owner = owner[torch.randperm(captions, generator=generator)]
    similarity = torch.randn(images, captions, generator=generator)
    return (2 * similarity).round() if ties else similarity, owner


def brute_force(similarity, owner):
    """Sort every row and column, wrong answers first among equals, and look for the first right one."""

    def rank(scores, right):
        order = sorted(range(len(scores)), key=lambda j: (-scores[j], right[j]))
        return 1 + next(position for position, j in enumerate(order) if right[j])

    owners = owner.tolist()
    i2t = [rank(row, [o == i for o in owners]) for i, row in enumerate(similarity.tolist()) if i in owners]
    t2i = [rank(c, [i == o for i in range(len(c))]) for c, o in zip(similarity.T.tolist(), owners)]
    return i2t, t2i


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_ranks_equal_brute_force(ties, block, monkeypatch):
    monkeypatch.setattr(ranking_module, "BLOCK_ELEMENTS", block)
    for seed in range(20):
        similarity, owner = gallery(seed, ties=ties)
        result = Ranking.from_scores(similarity, owner)
        assert (result.i2t.tolist(), result.t2i.tolist()) == brute_force(similarity, owner)


def test_metrics_of_a_written_out_example():
    # Captions 0 and 1 are of image 0, caption 2 is of image 1.
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]])
    result = Ranking.from_scores(similarity, torch.tensor([0, 0, 1]))
    assert result.i2t.tolist() == [1, 2] and result.t2i.tolist() == [2, 1, 2]
    assert result.metrics() == {
        "i2t": {"r1": 50.0, "r5": 100.0, "r10": 100.0},
        "t2i": {"r1": pytest.approx(100 / 3), "r5": 100.0, "r10": 100.0},
        "mean_r1": pytest.approx((50 + 100 / 3) / 2),
    }
    assert result.mean_recall() == pytest.approx((50 + 100 / 3 + 400) / 6)
    assert result.median_rank() == {"i2t": 1.5, "t2i": 2.0}
    assert result.ceiling() == {"i2t": 100.0, "t2i": 100.0}


def test_a_constant_model_finds_nothing():
    owner = torch.arange(20).repeat_interleave(5)
    metrics = Ranking.from_scores(torch.zeros(20, 100), owner).metrics()
    assert metrics["i2t"] == metrics["t2i"] == {"r1": 0.0, "r5": 0.0, "r10": 0.0}


def test_own_captions_that_tie_do_not_count_against_each_other():
    similarity = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    assert Ranking.from_scores(similarity, torch.tensor([0, 0, 1, 1])).i2t.tolist() == [1, 1]


def test_images_without_caption_are_distractors():
    similarity = torch.tensor([[0.5, 0.1], [0.9, 0.0], [0.2, 0.3]])
    result = Ranking.from_scores(similarity, torch.tensor([0, 2]))
    assert result.i2t.tolist() == [1, 1]  # These are the captions of images 0 and 2.
    assert result.t2i.tolist() == [2, 1]


def test_infinite_scores_are_ordered():
    similarity = torch.tensor([[-math.inf, 1.0], [2.0, math.inf]])
    assert Ranking.from_scores(similarity, torch.tensor([0, 1])).t2i.tolist() == [2, 1]


def top_candidates(similarity, owner, k):
    """The dual's candidate lists, as reranking gets them."""
    captions, images = similarity.topk(k, dim=1), similarity.T.topk(k, dim=1)
    return Ranking.from_candidates(
        captions=captions.indices,
        caption_scores=captions.values,
        images=images.indices,
        image_scores=images.values,
        caption_to_image=owner,
    )


def test_candidate_lists_give_the_same_ranks_and_misses_beyond():
    for seed in range(20):
        similarity, owner = gallery(seed)
        full, short = Ranking.from_scores(similarity, owner), top_candidates(similarity, owner, 3)
        for all_ranks, ranks in ((full.i2t, short.i2t), (full.t2i, short.t2i)):
            assert torch.equal(ranks, torch.where(all_ranks <= 3, all_ranks, math.inf))
        ceiling = {"i2t": recall_at_k(full.i2t, (3,))["r3"], "t2i": recall_at_k(full.t2i, (3,))["r3"]}
        assert short.ceiling() == ceiling
        assert short.metrics(ks=(1, 3)) == full.metrics(ks=(1, 3))
        assert short.metrics()["i2t"]["r10"] == ceiling["i2t"]


def test_reranking_changes_order_inside_the_list_only():
    common = {"captions": torch.tensor([[0, 1], [0, 1]]), "images": torch.tensor([[0], [0]])}
    result = Ranking.from_candidates(
        caption_scores=torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        image_scores=torch.tensor([[5.0], [5.0]]),
        caption_to_image=torch.tensor([0, 1]),
        **common,
    )
    assert result.i2t.tolist() == [2, 1]
    assert result.t2i.tolist() == [1, math.inf]
    assert result.median_rank()["t2i"] == math.inf


def test_candidate_order_does_not_matter_and_padding_is_no_candidate():
    scores = torch.tensor([[3.0, 1.0, 2.0, 9.0]])
    relevant = torch.tensor([[False, True, False, False]])
    valid = torch.tensor([[True, True, True, False]])
    shuffle = torch.tensor([3, 1, 0, 2])
    assert candidate_ranks(scores, relevant, valid).tolist() == [3]
    assert candidate_ranks(scores[:, shuffle], relevant[:, shuffle], valid[:, shuffle]).tolist() == [3]
    assert candidate_ranks(scores, ~valid, valid).tolist() == [math.inf]  # This slot is relevant, but padding.
    assert candidate_ranks(torch.ones(1, 4), relevant, valid).tolist() == [3]  # ties against the model
    assert candidate_ranks(scores.masked_fill(~valid, math.nan), relevant, valid).tolist() == [3]


def test_padded_lists_equal_unpadded_ones():
    similarity, owner = gallery(3)
    captions, images = similarity.topk(4, dim=1), similarity.T.topk(4, dim=1)
    result = Ranking.from_candidates(
        captions=pad(captions.indices, (0, 2), value=-1),
        caption_scores=pad(captions.values, (0, 2), value=99.0),
        images=pad(images.indices, (0, 2), value=-1),
        image_scores=pad(images.values, (0, 2), value=math.nan),
        caption_to_image=owner,
    )
    expected = top_candidates(similarity, owner, 4)
    assert torch.equal(result.i2t, expected.i2t) and torch.equal(result.t2i, expected.t2i)


def test_ndcg_closed_form():
    relevance = torch.tensor([[3.0, 0.0, 1.0]])
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    assert ndcg(relevance, relevance) == pytest.approx(1)
    gain = 1 / math.log2(2) + 3 / math.log2(4)  # The order is 2, 1, 0.
    assert ndcg(torch.tensor([[0.0, 1.0, 2.0]]), relevance) == pytest.approx(gain / ideal)
    assert ndcg(torch.tensor([[0.0, 1.0, 2.0]]), relevance, k=1) == pytest.approx(1 / 3)
    constant = (1 / math.log2(3) + 3 / math.log2(4)) / ideal  # ties against the model
    assert ndcg(torch.zeros(1, 3), relevance) == pytest.approx(constant)


def test_ndcg_does_not_count_queries_without_relevance_and_blocks_do_not_show(monkeypatch):
    scores, relevance = torch.randn(5, 8), torch.randint(0, 4, (5, 8)).float()
    expected = ndcg(scores, relevance, 3)
    monkeypatch.setattr(ranking_module, "BLOCK_ELEMENTS", 16)
    more = torch.cat([scores, torch.randn(1, 8)]), torch.cat([relevance, torch.zeros(1, 8)])
    assert ndcg(*more, 3) == pytest.approx(expected)


def test_map_at_r_closed_form():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    relevant = torch.tensor([[True, False, True, False, True]])
    assert mean_average_precision_at_r(scores, relevant) == pytest.approx((1 + 2 / 3) / 3)
    # The third relevant one at rank 5 is past R = 3: moving it within the tail changes nothing.
    assert mean_average_precision_at_r(scores, relevant[:, [0, 1, 2, 4, 3]]) == pytest.approx((1 + 2 / 3) / 3)
    assert mean_average_precision_at_r(relevant.float(), relevant) == 1
    assert mean_average_precision_at_r(torch.zeros(1, 5), relevant) == pytest.approx(1 / 9)  # F F T T T


def test_map_at_r_with_one_relevant_is_recall_at_1():
    similarity, _ = gallery(0, images=6, captions=6)
    result = Ranking.from_scores(similarity, torch.arange(6))
    value = mean_average_precision_at_r(similarity, torch.eye(6, dtype=torch.bool))
    assert 100 * value == pytest.approx(result.metrics()["i2t"]["r1"])


def test_paraphrase_stability_closed_forms():
    first, second = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 1, 5, 4]])
    assert overlap_at_k(first, second, 3) == pytest.approx((0 + 1 + 2 / 3) / 3)
    assert jaccard_at_k(first, second, 3) == pytest.approx(2 / 4)
    assert overlap_at_k(first, first, 4) == jaccard_at_k(first, first, 4) == 1
    assert overlap_at_k(first, first + 10, 4) == jaccard_at_k(first, first + 10, 4) == 0


def test_paraphrase_stability_against_sets():
    lists = [torch.stack([torch.randperm(12, generator=seeded(10 * s + q)) for q in range(5)]) for s in range(2)]
    overlaps, jaccards = [], []
    for a, b in zip(*(x.tolist() for x in lists)):
        overlaps.append(sum(len(set(a[:d]) & set(b[:d])) / d for d in range(1, 7)) / 6)
        jaccards.append(len(set(a[:6]) & set(b[:6])) / len(set(a[:6]) | set(b[:6])))
    assert overlap_at_k(*lists, 6) == pytest.approx(sum(overlaps) / 5)
    assert jaccard_at_k(*lists, 6) == pytest.approx(sum(jaccards) / 5)


def test_nan_scores_are_counted_in_the_error():
    scores, owner = torch.zeros(2, 3), torch.tensor([0, 1, 1])
    scores[0, 1] = scores[1, 2] = math.nan
    for call in (
        lambda: Ranking.from_scores(scores, owner),
        lambda: candidate_ranks(scores, scores == 0, scores.isnan() | True),
        lambda: ndcg(scores, torch.ones(2, 3)),
        lambda: mean_average_precision_at_r(scores, torch.ones(2, 3, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="2 of 6 scores are NaN"):
            call()


def candidates(**changes):
    lists = {"captions": torch.zeros(2, 1).long(), "caption_scores": torch.zeros(2, 1)}
    lists |= {"images": torch.zeros(3, 1).long(), "image_scores": torch.zeros(3, 1)}
    return Ranking.from_candidates(**(lists | {"caption_to_image": torch.tensor([0, 1, 1])} | changes))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Ranking.from_scores(torch.zeros(2, 3), torch.tensor([0, 1])), r"\(2, 3\) and \(2,\)"),
        (lambda: Ranking.from_scores(torch.zeros(2, 3), torch.tensor([0, 1, 2])), "from 0 to 1, got 2"),
        (lambda: Ranking.from_scores(torch.zeros(2, 0), torch.zeros(0).long()), r"\(2, 0\)"),
        (lambda: candidates(captions=torch.tensor([[0], [3]])), "captions from 0 to 2.*got 0 to 3"),
        (lambda: candidates(images=torch.tensor([[0], [-2], [0]])), "images from 0 to 1.*got -2 to 0"),
        (lambda: candidates(images=torch.zeros(2, 1).long()), "3 captions, got 2"),
        (lambda: candidates(caption_scores=torch.zeros(2, 2)), r"\(2, 2\).*\(2, 1\)"),
        (lambda: recall_at_k(torch.zeros(0)), "at least one query"),
        (lambda: ndcg(torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])), "got -1.0"),
        (lambda: ndcg(torch.zeros(1, 2), torch.zeros(1, 2)), "relevant candidate, got none"),
        (lambda: ndcg(torch.zeros(1, 2), torch.ones(1, 2), k=0), "got 0"),
        (lambda: overlap_at_k(torch.zeros(1, 3), torch.zeros(1, 2), 3), "<= 2 ranked candidates, got k 3"),
        (lambda: jaccard_at_k(torch.zeros(1, 3), torch.zeros(2, 3), 3), r"\(1, 3\) and \(2, 3\)"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

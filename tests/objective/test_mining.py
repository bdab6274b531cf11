import math

import pytest
import torch

from loopitr.objective.mining import mine_sample, mine_stratified, mine_topk

MINERS = [mine_topk, mine_sample, mine_stratified]
each_miner = pytest.mark.parametrize("mine", MINERS, ids=lambda f: f.__name__)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(mined):
    return [[i for i, v in zip(*row) if v] for row in zip(mined.indices.tolist(), mined.valid.tolist())]


@each_miner
def test_never_a_positive_a_twin_or_a_duplicate(mine):
    for seed in range(150):
        generator = seeded(seed)
        q, c, k = (int(torch.randint(1, high, (), generator=generator)) for high in (5, 12, 8))
        similarity = torch.randn(q, c, generator=generator)
        if seed % 3 == 0:
            similarity = similarity.round()  # ties
        if seed % 5 == 0:
            similarity[torch.rand(q, c, generator=generator) < 0.3] = (math.nan, math.inf, -math.inf)[seed % 3]
        positives = torch.rand(q, c, generator=generator) < (0.3, 0.9, 0.0)[seed % 3]
        groups = torch.randint(0, 6, (c,), generator=generator) if seed % 2 else None
        mined = mine(similarity, positives, k, groups=groups)
        assert mined.indices.shape == mined.valid.shape == (q, k)
        assert mined.indices.dtype == torch.int64 and mined.valid.dtype == torch.bool
        assert (mined.indices[~mined.valid] == 0).all()
        label = list(range(c)) if groups is None else groups.tolist()
        for actual, positive in zip(rows(mined), positives.tolist()):
            taken = [label[j] for j in actual]
            blocked = {label[j] for j in range(c) if positive[j]}
            assert len(taken) == len(set(taken))
            assert not blocked & set(taken)
            # nothing is withheld either: k, or all that there are
            assert len(actual) == min(k, len(set(label) - blocked))


@each_miner
@pytest.mark.parametrize("q, c", [(1, 1), (3, 0), (0, 3), (4, 2)])
def test_small_batches_are_masked_and_not_filled(mine, q, c):
    nothing = mine(torch.randn(q, c), torch.ones(q, c, dtype=torch.bool), 3)
    assert nothing.indices.shape == (q, 3) and not nothing.valid.any() and not nothing.indices.any()
    everything = mine(torch.randn(q, c), torch.zeros(q, c, dtype=torch.bool), 3)
    assert everything.valid.sum(-1).tolist() == [min(c, 3)] * q


@each_miner
def test_no_gradient_and_input_untouched(mine):
    similarity = torch.randn(3, 5, requires_grad=True)
    before, positives = similarity.detach().clone(), torch.eye(3, 5, dtype=torch.bool)
    mine(similarity, positives, 2)
    assert torch.equal(similarity, before) and similarity.grad is None
    assert torch.equal(positives, torch.eye(3, 5, dtype=torch.bool))


@each_miner
def test_no_value_is_read_back_from_the_device(mine):
    similarity = torch.zeros(3, 5, device="meta")  # has no values: reading one is an error
    groups = torch.zeros(5, dtype=torch.int64, device="meta")
    assert mine(similarity, similarity > 0, 7, groups=groups).indices.shape == (3, 7)


@each_miner
def test_half_precision_similarity(mine):
    similarity = torch.tensor([[0.9, 0.5, 0.1, -0.9]]).bfloat16()
    assert sorted(rows(mine(similarity, torch.tensor([[False, True, False, False]]), 3))[0]) == [0, 2, 3]


def test_topk_is_hardest_first():
    similarity = torch.tensor([[0.9, 0.1, 0.8, 0.5], [0.2, 0.9, 0.3, 0.1]])
    assert rows(mine_topk(similarity, torch.eye(2, 4, dtype=torch.bool), 2)) == [[2, 3], [2, 0]]


def test_topk_ranks_nan_last():
    similarity = torch.tensor([[math.nan, 1.0, -math.inf, 0.0]])
    positives = torch.tensor([[False, True, False, False]])
    assert rows(mine_topk(similarity, positives, 1)) == [[3]]
    assert sorted(rows(mine_topk(torch.full((1, 4), math.nan), positives, 3))[0]) == [0, 2, 3]


def test_groups_keep_the_hardest_twin_and_drop_twins_of_a_positive():
    similarity = torch.tensor([[0.9, 0.5, 0.7, 0.6, 0.8]])
    positives = torch.tensor([[True, False, False, False, False]])
    groups = torch.tensor([3, 7, 7, 1, 3])
    assert rows(mine_topk(similarity, positives, 3, groups=groups)) == [[2, 3]]


def test_sample_follows_the_softmax():
    similarity = torch.tensor([[0.0, 1.0, 2.0, 9.0]]).expand(20000, 4)
    positives = torch.tensor([[False, False, False, True]]).expand(20000, 4)
    mined = mine_sample(similarity, positives, 1, temperature=2.0, generator=seeded())
    share = torch.bincount(mined.indices[:, 0], minlength=4) / 20000
    expected = (torch.tensor([0.0, 1.0, 2.0]) / 2).softmax(-1)
    torch.testing.assert_close(share[:3], expected, atol=0.015, rtol=0)
    assert share[3] == 0


def test_sample_second_draw_is_without_replacement():
    similarity = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3)
    mined = mine_sample(similarity, torch.zeros(20000, 3, dtype=torch.bool), 2, generator=seeded())
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(-1)
    share = ((mined.indices[:, 0] == 2) & (mined.indices[:, 1] == 1)).float().mean()
    assert share.item() == pytest.approx((p[2] * p[1] / (1 - p[2])).item(), abs=0.015)


def test_sample_survives_rows_whose_softmax_underflows():
    similarity = torch.tensor([[1e4, -1e4, -1e4, -1e4], [-math.inf, -math.inf, -math.inf, 3e38]])
    mined = mine_sample(similarity, torch.eye(2, 4, dtype=torch.bool), 3, temperature=1e-3)
    assert mined.valid.tolist() == [[True] * 3] * 2
    assert sorted(rows(mined)[0]) == [1, 2, 3] and rows(mined)[1][0] == 3


def test_sample_is_repeatable_by_generator():
    similarity, positives = torch.randn(8, 30), torch.zeros(8, 30, dtype=torch.bool)
    draws = [mine_sample(similarity, positives, 4, generator=seeded(seed)).indices for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_sample_does_not_favour_a_twin():
    similarity = torch.zeros(20000, 3)
    groups = torch.tensor([0, 0, 1])
    mined = mine_sample(similarity, torch.zeros(20000, 3, dtype=torch.bool), 1, generator=seeded(), groups=groups)
    assert (mined.indices == 2).float().mean().item() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize(("pool", "strata"), [(8, [(0, 1), (2, 3), (4, 7)]), (9, [(0, 1), (2, 3), (4, 8)])])
def test_stratified_takes_one_of_each_part_of_the_pool_and_the_parts_grow(pool, strata):
    similarity = -torch.arange(20.0).expand(2000, 20)  # candidate j has rank j
    mined = mine_stratified(similarity, torch.zeros(2000, 20, dtype=torch.bool), 3, pool=pool, generator=seeded())
    for slot, (first, last) in enumerate(strata):
        counts = torch.bincount(mined.indices[:, slot], minlength=20).tolist()
        assert [j for j, n in enumerate(counts) if n] == list(range(first, last + 1))
        assert min(n for n in counts if n) > 0.85 * 2000 / (last + 1 - first)


@pytest.mark.parametrize("size", [1, 2, 5, 9, 63, 64, 200])
@pytest.mark.parametrize("k", [1, 2, 4, 5, 8])
def test_stratified_goes_down_the_whole_pool_in_order_of_hardness(size, k):
    similarity, positives = -torch.arange(size).float().expand(3000, size), torch.zeros(3000, size, dtype=torch.bool)
    mined = mine_stratified(similarity, positives, k, pool=max(size, k), generator=seeded())
    kept = min(k, size)
    assert mined.valid.sum(1).eq(kept).all()
    chosen = mined.indices[:, :kept]
    assert (chosen.diff(dim=1) > 0).all()
    assert chosen[:, 0].min() == 0 and chosen[:, -1].max() == size - 1


def test_stratified_with_a_pool_of_k_is_topk():
    similarity, positives = torch.randn(6, 15), torch.rand(6, 15) < 0.2
    stratified, top = mine_stratified(similarity, positives, 5, pool=5), mine_topk(similarity, positives, 5)
    assert torch.equal(stratified.indices, top.indices) and torch.equal(stratified.valid, top.valid)


def test_stratified_splits_a_short_row_as_far_as_it_goes():
    similarity = -torch.arange(5.0)[None]
    mined = mine_stratified(similarity, torch.tensor([[True, False, False, False, False]]), 3, pool=30)
    first, second, third = rows(mined)[0]
    assert first == 1 and second == 2 and third in (3, 4)


@each_miner
def test_wrong_input_is_named(mine):
    positives = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="k >= 1, got 0"):
        mine(torch.zeros(2, 3), positives, 0)
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 3\)"):
        mine(torch.zeros(2, 4), positives, 1)
    with pytest.raises(ValueError, match="float32"):
        mine(torch.zeros(2, 3), positives.float(), 1)
    with pytest.raises(ValueError, match=r"groups \[3\], got \(2,\)"):
        mine(torch.zeros(2, 3), positives, 1, groups=torch.zeros(2))


def test_wrong_options_are_named():
    similarity, positives = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="temperature > 0, got 0"):
        mine_sample(similarity, positives, 1, temperature=0)
    with pytest.raises(ValueError, match="pool 2 and k 3"):
        mine_stratified(similarity, positives, 3, pool=2)

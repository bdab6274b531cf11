import math

import pytest
import torch
import torch.nn.functional as F

from loopitr.objective.losses import balanced_itm_loss, itm_accuracy, itm_loss, lce_loss, mlm_loss


def test_itm_closed_form():
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    loss = itm_loss(logits, torch.tensor([True, False]), torch.tensor([True, True]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 2, abs=1e-12)


def test_balanced_itm_is_the_mean_of_the_two_kinds_means():
    log_odds = torch.tensor([2.0, -1.0, 0.5, 0.0, 3.0], dtype=torch.float64)  # These are log-odds of a match.
    logits = torch.stack([torch.zeros_like(log_odds), log_odds], 1)
    matching = torch.tensor([True, False, False, False, True])
    loss = balanced_itm_loss(logits, matching, torch.ones(5, dtype=torch.bool))
    positives = [math.log(1 + math.exp(-x)) for x in (2, 3)]
    negatives = [math.log(1 + math.exp(x)) for x in (-1, 0.5, 0)]
    assert loss.item() == pytest.approx((sum(positives) / 2 + sum(negatives) / 3) / 2, abs=1e-12)
    # It does not matter how many there are of either kind.
    repeated = torch.tensor([0, 1, 2, 3, 4, 1, 2, 3, 1, 2, 3])
    again = balanced_itm_loss(logits[repeated], matching[repeated], torch.ones(11, dtype=torch.bool))
    torch.testing.assert_close(again, loss)


def test_balanced_itm_is_the_plain_mean_where_a_kind_is_missing_or_both_are_as_many():
    logits, valid = torch.randn(6, 2), torch.ones(6, dtype=torch.bool)
    half = torch.tensor([True, False, True, False, True, False])
    for matching in (torch.ones_like(valid), torch.zeros_like(valid), half):
        expected = F.cross_entropy(logits, matching.long())
        torch.testing.assert_close(balanced_itm_loss(logits, matching, valid), expected)
    only_negatives = balanced_itm_loss(logits, half, ~half)  # The other kind is there, but not valid.
    torch.testing.assert_close(only_negatives, F.cross_entropy(logits[1::2], half[1::2].long()))


@pytest.mark.parametrize("loss", [itm_loss, balanced_itm_loss])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_itm_ignores_invalid_slots_whatever_they_hold(junk, loss):
    logits = torch.tensor([[0.3, -0.2], [junk, junk], [1.0, 2.0]], requires_grad=True)  # One of each kind is valid.
    matching, valid = torch.tensor([True, False, False]), torch.tensor([True, False, True])
    value = loss(logits, matching, valid)
    value.backward()
    torch.testing.assert_close(value, F.cross_entropy(logits[valid], matching[valid].long()))
    assert torch.equal(logits.grad[1], torch.zeros(2)) and logits.grad.isfinite().all()
    assert itm_accuracy(logits, matching, valid).item() == 0


@pytest.mark.parametrize("loss", [itm_loss, balanced_itm_loss])
def test_itm_with_nothing_valid_is_zero_and_attached(loss):
    logits = torch.full((3, 2), math.nan, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    value = loss(logits, none, none)
    value.backward()
    assert value.item() == 0 and torch.equal(logits.grad, torch.zeros(3, 2))
    assert itm_accuracy(logits, none, none).item() == 0
    empty = torch.zeros(0, 2, requires_grad=True)
    loss(empty, none[:0], none[:0]).backward()


def test_itm_accuracy_counts_only_valid_and_a_constant_head_scores_nothing():
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0], [3.0, 1.0], [3.0, 1.0]])
    matching = torch.tensor([True, False, False, True])
    assert itm_accuracy(logits, matching, torch.tensor([True, True, True, False])).item() == pytest.approx(2 / 3)
    assert itm_accuracy(torch.ones(4, 2), matching, torch.ones(4, dtype=torch.bool)).item() == 0


def test_mlm_equals_cross_entropy_over_the_labelled_tokens():
    logits, labels = torch.randn(6, 11), torch.tensor([3, -100, 0, 10, -100, 5])
    torch.testing.assert_close(mlm_loss(logits, labels), F.cross_entropy(logits, labels))


def test_mlm_with_no_label_is_zero_and_attached():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = mlm_loss(logits, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(3, 5))


def test_no_value_is_read_back_from_the_device():
    logits, mask = torch.zeros(4, 2, device="meta"), torch.ones(4, dtype=torch.bool, device="meta")
    for of_pairs in (itm_loss, balanced_itm_loss, itm_accuracy):
        assert of_pairs(logits, mask, mask).shape == ()
    assert mlm_loss(logits, mask.long()).shape == ()


def test_gradcheck():
    logits = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    matching, valid = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, True])
    for loss in (itm_loss, balanced_itm_loss):
        assert torch.autograd.gradcheck(lambda x: loss(x, matching, valid), logits)
    assert torch.autograd.gradcheck(lambda x: mlm_loss(x, torch.tensor([1, -100, 0, 1])), logits)


def test_wrong_shapes_are_named():
    valid = torch.ones(3, dtype=torch.bool)
    for loss in (itm_loss, balanced_itm_loss):
        with pytest.raises(ValueError, match=r"\(3, 3\)"):
            loss(torch.zeros(3, 3), valid, valid)
        with pytest.raises(ValueError, match="int64"):
            loss(torch.zeros(3, 2), valid.long(), valid)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\)"):
        mlm_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long))


def test_lce_closed_form_and_what_a_query_shares_cancels():
    scores = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]], dtype=torch.float64)
    valid = torch.ones(2, 3, dtype=torch.bool)
    expected = [math.log(sum(math.exp(s - row[0]) for s in row)) for row in scores.tolist()]
    assert lce_loss(scores, valid).item() == pytest.approx(sum(expected) / 2, abs=1e-12)
    shared = scores + torch.tensor([[7.0], [-3.0]])
    torch.testing.assert_close(lce_loss(shared, valid), lce_loss(scores, valid))
    better = scores + torch.tensor([1.0, 0.0, 0.0])
    assert lce_loss(better, valid) < lce_loss(scores, valid)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_lce_ignores_masked_slots_and_queries_without_a_negative(junk):
    scores = torch.tensor([[1.0, 0.0, junk], [0.5, junk, junk], [junk, 1.0, 2.0]], requires_grad=True)
    valid = torch.tensor([[True, True, False], [True, False, False], [False, True, True]])
    value = lce_loss(scores, valid)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(1.0).exp().add(1).log() - 1)
    assert scores.grad.isfinite().all() and scores.grad[1:].abs().sum() == 0 and scores.grad[0, 2] == 0
    nothing = lce_loss(scores, torch.zeros_like(valid))
    nothing.backward()
    assert nothing.item() == 0 and scores.grad.isfinite().all()


def test_lce_gradcheck_and_what_it_refuses():
    valid = torch.tensor([[True, True, False], [True, True, True]])
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lce_loss(x, valid), scores)
    with pytest.raises(ValueError, match="one shape"):
        lce_loss(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool mask"):
        lce_loss(torch.zeros(2, 3), torch.ones(2, 3))

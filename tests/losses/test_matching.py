import math

import pytest
import torch
import torch.nn.functional as F

from loopitr.losses import itm_accuracy, itm_loss, mlm_loss


def test_itm_closed_form():
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    loss = itm_loss(logits, torch.tensor([True, False]), torch.tensor([True, True]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 2, abs=1e-12)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_itm_ignores_invalid_slots_whatever_they_hold(junk):
    logits = torch.tensor([[0.3, -0.2], [junk, junk], [1.0, 2.0]], requires_grad=True)
    matching, valid = torch.tensor([True, False, False]), torch.tensor([True, False, True])
    loss = itm_loss(logits, matching, valid)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits[valid], matching[valid].long()))
    assert torch.equal(logits.grad[1], torch.zeros(2)) and logits.grad.isfinite().all()
    assert itm_accuracy(logits, matching, valid).item() == 0


def test_itm_with_nothing_valid_is_zero_and_attached():
    logits = torch.full((3, 2), math.nan, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    loss = itm_loss(logits, none, none)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(3, 2))
    assert itm_accuracy(logits, none, none).item() == 0
    empty = torch.zeros(0, 2, requires_grad=True)
    itm_loss(empty, none[:0], none[:0]).backward()


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
    assert itm_loss(logits, mask, mask).shape == itm_accuracy(logits, mask, mask).shape == ()
    assert mlm_loss(logits, mask.long()).shape == ()


def test_gradcheck():
    logits = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    matching, valid = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(lambda x: itm_loss(x, matching, valid), logits)
    assert torch.autograd.gradcheck(lambda x: mlm_loss(x, torch.tensor([1, -100, 0, 1])), logits)


def test_wrong_shapes_are_named():
    valid = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        itm_loss(torch.zeros(3, 3), valid, valid)
    with pytest.raises(ValueError, match="int64"):
        itm_loss(torch.zeros(3, 2), valid.long(), valid)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\)"):
        mlm_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long))

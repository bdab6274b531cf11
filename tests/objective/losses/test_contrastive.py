import math

import pytest
import torch
import torch.nn.functional as F

from loopitr.objective.losses import itc_loss, siglip_loss, soft_cross_entropy


def identity_mask(rows, columns):
    return torch.tensor(rows)[:, None] == torch.tensor(columns)[None, :]


def test_itc_equals_cross_entropy_when_all_identities_differ():
    logits = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    positives = torch.eye(5, dtype=torch.bool)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(itc_loss(logits, logits.T, positives, positives), expected)


def test_itc_with_global_columns_uses_the_mask_and_not_the_position():
    logits = torch.randn(3, 9, dtype=torch.float64)
    positives = torch.zeros(3, 9, dtype=torch.bool)
    positives[torch.arange(3), torch.arange(3) + 6] = True  # The rows are those of the third of three ranks.
    expected = F.cross_entropy(logits, torch.arange(3) + 6)
    torch.testing.assert_close(itc_loss(logits, logits, positives, positives), expected)


def test_itc_splits_the_target_over_the_positives():
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    positives = torch.tensor([[True, True, False]])
    log_sum = math.log(math.e**2 + math.e + 1)
    assert itc_loss(logits, logits, positives, positives).item() == pytest.approx(log_sum - 1.5, abs=1e-12)


def test_itc_does_not_count_a_row_without_positive():
    logits = torch.randn(3, 4, dtype=torch.float64)
    positives = identity_mask([0, 1, 7], [0, 1, 2, 1])
    kept = itc_loss(logits[:2], logits[:2], positives[:2], positives[:2])
    torch.testing.assert_close(itc_loss(logits, logits, positives, positives), kept)


def test_itc_with_no_positive_at_all_is_zero_with_zero_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = itc_loss(logits, logits, *[torch.zeros(2, 3, dtype=torch.bool)] * 2)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(2, 3))


def test_itc_is_a_mean_over_rows_so_that_equal_shards_average_to_the_whole():
    logits = torch.randn(6, 6, dtype=torch.float64)
    positives = identity_mask([0, 0, 1, 2, 3, 1], [0, 0, 1, 2, 3, 1])
    shards = [itc_loss(logits[r], logits.T[r], positives[r], positives.T[r]) for r in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(sum(shards) / 2, itc_loss(logits, logits.T, positives, positives.T))


def test_soft_cross_entropy_ignores_masked_columns():
    logits = torch.tensor([[1.0, -torch.inf, 0.0]], requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor([[1.0, 0.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert logits.grad.isfinite().all()


def test_siglip_closed_form():
    logits = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.float64)
    positives = torch.eye(2, dtype=torch.bool)
    expected = sum(math.log(1 + math.exp(x)) for x in (-1.0, -2.0, 0.0, -3.0)) / 2
    assert siglip_loss(logits, positives).item() == pytest.approx(expected, abs=1e-12)


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(4, 4).bfloat16()
    positives = torch.eye(4, dtype=torch.bool)
    loss = itc_loss(logits, logits.T, positives, positives)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, itc_loss(logits.float(), logits.float().T, positives, positives))


def test_no_value_is_read_back_from_the_device():
    x = torch.zeros(4, 5, device="meta")  # A tensor on `meta` has no values: reading one is an error.
    assert itc_loss(x, x, x > 0, x > 0).shape == siglip_loss(x, x > 0).shape == ()


def test_gradcheck():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    positives = identity_mask([0, 1, 9], [0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda x: itc_loss(x, 2 * x, positives, positives), logits)
    assert torch.autograd.gradcheck(lambda x: siglip_loss(x, positives), logits)


def test_local_labels_with_gathered_logits_are_an_error():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 2\)"):
        itc_loss(torch.zeros(2, 4), torch.zeros(2, 4), *[torch.eye(2, dtype=torch.bool)] * 2)
    with pytest.raises(ValueError, match="bool"):
        siglip_loss(torch.zeros(2, 2), torch.eye(2))

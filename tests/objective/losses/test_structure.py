import math

import pytest
import torch
import torch.nn.functional as F

from loopitr.objective.losses import cmc_loss, cmd_loss


def embeds(batch, width, seed=0):
    x = torch.randn(batch, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def test_cmd_equals_the_written_out_sum():
    source, target = embeds(4, 3), embeds(4, 5, seed=1)
    p, q = (source @ source.T / 0.1).softmax(-1), (target @ target.T / 0.2).softmax(-1)
    expected = sum((p[i, j] * (p[i, j] / q[i, j]).log()).item() for i in range(4) for j in range(4)) / 4
    loss = cmd_loss(source, target, source_temperature=0.1, target_temperature=0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_cmd_vanishes_for_one_structure_in_any_rotation():
    source = embeds(6, 4)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert cmd_loss(source, source @ rotation).item() == pytest.approx(0, abs=1e-12)
    assert cmd_loss(source, embeds(6, 4, seed=1)).item() > 0.01
    assert cmd_loss(source[:1], embeds(1, 7)).item() == 0


def test_cmc_closed_form_and_rotation():
    source = torch.eye(3, dtype=torch.float64)
    expected = math.log(math.exp(2) + 2) - 2
    assert cmc_loss(source, source, temperature=0.5).item() == pytest.approx(expected, abs=1e-12)
    assert cmc_loss(source, source.roll(1, 0), temperature=0.5).item() == pytest.approx(expected + 2, abs=1e-12)


def test_cmc_of_valid_rows_is_that_of_a_batch_without_the_others():
    source, target = embeds(6, 3), embeds(6, 3, seed=1).requires_grad_()
    valid = torch.tensor([True, False, True, True, False, True])
    loss, expected = cmc_loss(source, target, valid=valid), cmc_loss(source[valid], target[valid])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    gradient, wanted = (torch.autograd.grad(x, target)[0] for x in (loss, expected))
    torch.testing.assert_close(gradient, wanted)
    assert cmc_loss(source, target, valid=torch.zeros(6, dtype=torch.bool)).item() == 0


def test_gradcheck():
    source, target = embeds(4, 3), embeds(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cmd_loss(source, x), target)
    assert torch.autograd.gradcheck(lambda x: cmc_loss(source, x), target)
    valid = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda x: cmc_loss(source, x, valid=valid), target)


def test_autocast_changes_nothing():
    source, target = embeds(4, 3).float(), embeds(4, 3, seed=1).float()
    for loss in (cmd_loss, cmc_loss):
        exact = loss(source, target)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(source, target), exact)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"\(4, 3\), \(5, 3\)"):
        cmd_loss(embeds(4, 3), embeds(5, 3))
    with pytest.raises(ValueError, match="got 3 and 5"):
        cmc_loss(embeds(4, 3), embeds(4, 5))
    with pytest.raises(ValueError, match=r"valid to be a bool mask \[4\], got torch.int64 \(3,\)"):
        cmc_loss(embeds(4, 3), embeds(4, 3), valid=torch.arange(3))
    with pytest.raises(ValueError, match="target_temperature > 0, got 0"):
        cmd_loss(embeds(4, 3), embeds(4, 3), target_temperature=0)

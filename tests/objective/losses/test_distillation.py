import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from loopitr.objective.losses import (
    adr_mse,
    cprd,
    hard_above_mean,
    hard_above_threshold,
    hard_top,
    kl,
    listmle,
    listnet,
    margin_mse,
    ranknet,
)


def cprd_top2(student, teacher, valid):
    return cprd(student, teacher, valid, hard_top(teacher, valid, 2))


LOSSES = [kl, listnet, cprd_top2, listmle, margin_mse, ranknet, adr_mse]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def scores(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everything(x):
    return torch.ones_like(x, dtype=torch.bool)


def some_valid():
    # Rows are full, ragged, of one slot only, and empty.
    return torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def cprd_loop(student, teacher, valid, hard):
    """The design's formula, written out: terms j of a query, the candidates k from j on."""
    queries = []
    for s, t, v, h in zip(student.tolist(), teacher.tolist(), valid.tolist(), hard.tolist()):
        order = sorted((c for c in range(len(s)) if v[c]), key=lambda c: -t[c])
        prefix = [c for c in order if h[c]]
        assert order[: len(prefix)] == prefix
        terms = []
        for j in range(len(prefix)):
            denominator = 0.0
            for k in range(j, len(order)):
                denominator += math.exp(s[order[k]])
            terms.append(-math.log(math.exp(s[order[j]]) / denominator))
        if terms:
            queries.append(sum(terms) / len(terms))
    return sum(queries) / len(queries)


@each_loss
def test_gradcheck_with_masked_slots(loss):
    student, teacher = scores(4, 5).requires_grad_(), scores(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, some_valid()), student)


@each_loss
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_slots_are_ignored_whatever_they_hold(loss, junk):
    valid, student, teacher = some_valid(), scores(4, 5), scores(4, 5, seed=1)
    clean = student.clone().requires_grad_()
    expected = loss(clean, teacher, valid)
    expected.backward()
    dirty = student.masked_fill(~valid, junk).requires_grad_()
    actual = loss(dirty, teacher.masked_fill(~valid, junk), valid)
    actual.backward()
    assert torch.equal(actual, expected)
    assert torch.equal(dirty.grad, clean.grad)
    assert torch.equal(dirty.grad[~valid], torch.zeros(11, dtype=torch.float64))


@each_loss
def test_rows_with_nothing_to_teach_are_not_counted(loss):
    # A lone candidate teaches nothing; cprd counts it where it is hard, so the mask leaves it out there.
    valid = some_valid()
    valid[2] = False
    student, teacher = scores(4, 5), scores(4, 5, seed=1)
    torch.testing.assert_close(loss(student, teacher, valid), loss(student[:2], teacher[:2], valid[:2]))


@each_loss
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (2, 1)])
def test_nothing_valid_is_zero_finite_and_attached(loss, shape):
    student = torch.full(shape, math.nan, requires_grad=True)
    value = loss(student, torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros(shape))


@each_loss
def test_candidate_order_and_padding_do_not_matter(loss):
    student, teacher, valid = scores(3, 6), scores(3, 6, seed=1), everything(scores(3, 6))
    valid[1, 4] = False
    expected = loss(student, teacher, valid)
    shuffle = torch.tensor([0, 5, 3, 1, 4, 2])  # The positive stays first, as margin_mse needs it.
    torch.testing.assert_close(loss(student[:, shuffle], teacher[:, shuffle], valid[:, shuffle]), expected)
    padded = [F.pad(x, (0, 2)) for x in (student, teacher, valid)]
    torch.testing.assert_close(loss(*padded), expected)


@each_loss
def test_half_precision_is_computed_in_float32(loss):
    student, teacher, valid = scores(4, 5).bfloat16(), scores(4, 5, seed=1).bfloat16(), some_valid()
    assert loss(student, teacher, valid).dtype == torch.float32
    torch.testing.assert_close(loss(student, teacher, valid), loss(student.float(), teacher.float(), valid))


@each_loss
def test_descending_the_loss_brings_the_student_to_the_teachers_order(loss):
    teacher = torch.tensor([[2.0, 0.5, -1.0]])
    student = torch.zeros(1, 3, requires_grad=True)
    optimizer = torch.optim.SGD([student], lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        loss(student, teacher, everything(teacher)).backward()
        optimizer.step()
    assert student[0].argsort(descending=True).tolist() == [0, 1, 2]


@each_loss
def test_extreme_scores_stay_finite(loss):
    student = torch.tensor([[100.0, -100.0, 0.0]], requires_grad=True)
    value = loss(student, torch.tensor([[-50.0, 50.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@each_loss
def test_no_value_is_read_back_from_the_device(loss):
    x = torch.zeros(4, 5, device="meta")  # A tensor on `meta` has no values: reading one is an error.
    assert loss(x, x, everything(x)).shape == ()


@each_loss
def test_wrong_input_is_named(loss):
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))


def test_kl_equals_kl_div_over_the_valid_candidates():
    student, teacher, valid = scores(1, 5), scores(1, 5, seed=1), some_valid()[1:2]
    p = (teacher[valid] / 2).softmax(-1)
    expected = (p * (p.log() - student[valid].log_softmax(-1))).sum()
    torch.testing.assert_close(kl(student, teacher, valid, teacher_temperature=2.0), expected)
    assert kl(teacher + 3, teacher, everything(teacher)).item() == pytest.approx(0, abs=1e-12)


def test_listnet_is_kl_plus_the_teachers_entropy():
    student, teacher = scores(3, 5), scores(3, 5, seed=1)
    p = teacher.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    losses = [loss(student, teacher, everything(student)) for loss in (listnet, kl)]
    torch.testing.assert_close(losses[0], losses[1] + entropy)


def test_cprd_equals_the_written_out_loop():
    for seed in range(20):
        student, teacher = scores(6, 7, seed=seed), scores(6, 7, seed=100 + seed)
        valid = torch.rand(6, 7, generator=torch.Generator().manual_seed(seed)) < 0.8
        for hard in (
            hard_top(teacher, valid, 1 + seed % 7),
            hard_above_mean(teacher, valid),
            hard_above_threshold(teacher, valid, probability=0.6),
        ):
            expected = cprd_loop(student, teacher, valid, hard)
            assert cprd(student, teacher, valid, hard).item() == pytest.approx(expected, abs=1e-12)


def test_cprd_closed_form():
    # The teacher's order is column 2, 0, 1, and two of them are hard.
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[5.0, -1.0, 7.0]])
    hard = torch.tensor([[True, False, True]])
    first = math.log((math.exp(2) + 1 + math.e) / math.exp(2))
    second = math.log((1 + math.e) / 1)
    assert cprd(student, teacher, everything(teacher), hard).item() == pytest.approx((first + second) / 2, abs=1e-6)
    # The last of all has only itself in the denominator: its term is zero, and counted.
    assert cprd(student, teacher, hard, hard).item() == pytest.approx(math.log(math.e**2 + 1) / 2 - 1, abs=1e-6)


def test_cprd_does_not_depend_on_the_order_of_easy_negatives():
    student = scores(4, 6)
    teacher = torch.tensor([3.0, 2.0, -1.0, -2.0, -3.0, -4.0]).expand(4, 6)
    reordered = torch.tensor([3.0, 2.0, -4.0, -1.5, -9.0, -1.0]).expand(4, 6)
    # Among the hard ones the order does matter.
    swapped = torch.tensor([2.0, 3.0, -1.0, -2.0, -3.0, -4.0]).expand(4, 6)
    valid = everything(teacher)
    orders = (teacher, reordered, swapped)
    before, after, other = (cprd(student, order, valid, hard_above_threshold(order, valid)) for order in orders)
    torch.testing.assert_close(before, after)
    assert not torch.allclose(before, other)


def test_cprd_with_the_top_rule_does_not_depend_on_the_teachers_scale():
    student, teacher, valid = scores(4, 6), scores(4, 6, seed=1), everything(scores(4, 6))
    expected = cprd(student, teacher, valid, hard_top(teacher, valid, 3))
    for changed in (teacher.exp(), 10 * teacher - 3, teacher**3, teacher.sigmoid()):
        torch.testing.assert_close(cprd(student, changed, valid, hard_top(changed, valid, 3)), expected)


def test_cprd_gives_easy_negatives_one_push_and_no_order():
    student = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, -1.0, -2.0, -3.0]])
    cprd(student, teacher, everything(teacher), hard_top(teacher, everything(teacher), 1)).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-0.75, 0.25, 0.25, 0.25]]))


def test_cprd_ignores_hard_marks_on_masked_slots():
    student, teacher, valid = scores(4, 5), scores(4, 5, seed=1), some_valid()
    hard = hard_top(teacher, valid, 2)
    torch.testing.assert_close(cprd(student, teacher, valid, hard | ~valid), cprd(student, teacher, valid, hard))


def test_cprd_with_no_hard_negative_is_zero_and_attached():
    student = scores(2, 3).requires_grad_()
    loss = cprd(student, scores(2, 3), everything(student), ~everything(student))
    loss.backward()
    assert loss.item() == 0 and torch.equal(student.grad, torch.zeros_like(student))


def test_listmle_is_the_sum_of_cprds_terms_with_everything_hard():
    student, teacher = scores(3, 5), scores(3, 5, seed=1)
    valid = everything(student)
    torch.testing.assert_close(listmle(student, teacher, valid), 5 * cprd(student, teacher, valid, valid))
    two = torch.tensor([[0.0, 1.0]])  # Of two items it is the logistic loss of the pair.
    assert listmle(two, -two, everything(two)).item() == pytest.approx(math.log(1 + math.e), abs=1e-6)


def test_listmle_is_a_distribution_over_orders():
    student = scores(1, 3)
    orders = [torch.tensor([order], dtype=torch.float64) for order in permutations(range(3))]
    total = sum(torch.exp(-listmle(student, order, everything(student))).item() for order in orders)
    assert total == pytest.approx(1, abs=1e-12)


def test_margin_mse_closed_form():
    student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[5.0, 4.5, 1.0]])
    # The margins are 1 and 2 against 0.5 and 4.
    assert margin_mse(student, teacher, everything(student)).item() == pytest.approx((0.25 + 4) / 2)
    assert margin_mse(student, teacher, torch.tensor([[True, True, False]])).item() == pytest.approx(0.25)
    # Without a positive there is no margin.
    assert margin_mse(student, teacher, torch.tensor([[False, True, True]])).item() == 0


def test_ranknet_closed_form_and_ties():
    student = torch.tensor([[1.0, 0.0, 3.0]])
    pairs = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(2)), math.log(1 + math.exp(3))]  # 0>1, 0>2, 1>2
    teacher = torch.tensor([[3.0, 2.0, 1.0]])
    assert ranknet(student, teacher, everything(student)).item() == pytest.approx(sum(pairs) / 3, abs=1e-6)
    tied = torch.tensor([[3.0, 3.0, 1.0]])
    assert ranknet(student, tied, everything(student)).item() == pytest.approx(sum(pairs[1:]) / 2, abs=1e-6)
    assert ranknet(student, torch.ones(1, 3), everything(student)).item() == 0


def test_adr_mse_closed_form():
    student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[9.0, 1.0]])
    up, down = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(4))  # The temperature is 0.5.
    soft = [1 + up, 1 + down]
    expected = ((1 - soft[0]) ** 2 / math.log2(2) + (2 - soft[1]) ** 2 / math.log2(3)) / 2
    loss = adr_mse(student, teacher, everything(student), temperature=0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    teacher = torch.tensor([[30.0, 20.0, 10.0]])
    assert adr_mse(10 * teacher, teacher, everything(teacher)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, v: hard_top(x, v, 0), "m >= 1, got 0"),
        (lambda x, v: hard_above_threshold(x, v, probability=1.0), "got 1.0"),
        (lambda x, v: kl(x, x, v, teacher_temperature=0.0), "teacher_temperature > 0, got 0.0"),
        (lambda x, v: adr_mse(x, x, v, temperature=-1.0), "got -1.0"),
    ],
)
def test_wrong_options_are_named(call, message):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        call(x, everything(x))

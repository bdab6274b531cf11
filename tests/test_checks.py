"""What is said of options out of range."""

import numpy as np
import pytest

from loopitr.checks import check_at_least, check_known, check_whole


def test_values_in_range_and_unset_ones_pass():
    check_at_least(1, "train", batch_size=1, max_steps=None, lr=1.5)
    check_known(("topk", "sample"), mining="sample")


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        ((1, "train"), {"epochs": 3, "batch_size": 0}, r"^train.batch_size must be at least 1, got 0$"),
        ((0,), {"rerank": -3}, r"^rerank must be at least 0, got -3$"),
        (
            (0, "objective"),
            {"wanted": "a weight >= 0", "itc": -1.0},
            r"^objective.itc must be a weight >= 0, got -1.0$",
        ),
        ((0, "train"), {"lr": float("nan")}, r"^train.lr must be at least 0, got nan$"),
    ],
)
def test_a_value_out_of_range_is_named(arguments, values, message):
    with pytest.raises(ValueError, match=message):
        check_at_least(*arguments, **values)


def test_a_name_that_is_not_known_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"^unknown mining 'hard'; known: topk, sample$"):
        check_known(("topk", "sample"), mining="hard")


@pytest.mark.parametrize("value", [2.5, "3", True, None, float("nan"), [1]])
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match="top must be a whole number of at least 1, got"):
        check_whole(1, top=value)


def test_whole_numbers():
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        check_whole(1, top=0)
    check_whole(1, top=np.int64(3), rerank=10**30)
    check_whole(1, unset=True, top=None)


def test_a_text_is_no_number():
    with pytest.raises(ValueError, match="weight must be at least 0, got '1'"):
        check_at_least(0, weight="1")

"""Ranks that were started by hand: they meet before their process group, and nonsense in their variables is named."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from accelerate.utils.other import get_free_port

from loopitr.training import meeting
from loopitr.training.meeting import check_size, meet


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(meeting, "PAUSE", 0.001)
    monkeypatch.setattr(meeting, "SECONDS", 0.3)


def variables(rank, size, **own):
    return {"WORLD_SIZE": str(size), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", **own}


def outcomes(*environments, late=0.0):
    """What each rank, in a thread, got: True for a meeting, or the error; all but the first come `late`."""
    port, kept = str(get_free_port()), []

    def one(number):
        time.sleep(late if number else 0.0)
        try:
            kept.append(meet({"MASTER_PORT": port, **environments[number]}))
        except ValueError as error:
            return str(error)
        return kept[-1] is not None

    with ThreadPoolExecutor(len(environments)) as pool:
        return list(pool.map(one, range(len(environments))))


def test_all_ranks_meet(monkeypatch):
    monkeypatch.setattr(meeting, "SECONDS", 60)
    assert outcomes(*(variables(rank, 3) for rank in range(3))) == [True] * 3
    assert outcomes(variables(1, 2), variables(0, 2), late=0.05) == [True] * 2  # rank 0 comes last


def test_ranks_that_do_not_come_are_named():
    first, second = outcomes(variables(0, 4), variables(2, 4))
    assert first.startswith("2 of 4 ranks came within 0.3 s, and rank 1, 3 did not")
    assert "rank 1, 3 did not" in second or second.startswith("rank 2")


def test_without_rank_0_the_others_say_so():
    (only,) = outcomes(variables(1, 2))
    assert only.startswith("rank 1 cannot reach rank 0 at 127.0.0.1:") and "\n" not in only


def test_ranks_that_disagree_are_told():
    results = outcomes(variables(0, 2), variables(1, 3), late=0.05)
    assert "WORLD_SIZE is 3 here, and 2 for another rank" in results
    results = outcomes(variables(0, 3), variables(1, 3), variables(1, 3), late=0.05)
    assert any("RANK 1 is taken" in str(result) for result in results)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node1"},
        {"WORLD_SIZE": "1"},
        variables(0, 1, LOCAL_RANK="0"),
        variables(3, 8, LOCAL_RANK="3", LOCAL_WORLD_SIZE="4", TORCHELASTIC_RUN_ID="x"),
        {"PMI_RANK": "1", "PMI_SIZE": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "1", "LOCAL_RANK": "-1"},
    ],
)
def test_others_are_left_alone(environment):
    assert meet(environment) is None


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "abc", "RANK": "0"}, "WORLD_SIZE must be an integer, got 'abc'"),
        ({"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE must be an integer, got ''"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE must be at least 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is -1"),
        ({"RANK": "3"}, "RANK is 3, and WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK must be an integer"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK is 4, and LOCAL_WORLD_SIZE is 4"),
        (variables(0, 2, MASTER_PORT="http"), "MASTER_PORT must be an integer"),
        (variables(0, 2, MASTER_PORT="99999"), "MASTER_PORT must be from 1 to 65535, got 99999"),
        (variables(0, 2, LOOPITR_MEETING_SECONDS="long"), "LOOPITR_MEETING_SECONDS must be an integer"),
    ],
)
def test_nonsense_is_named(environment, named):
    with pytest.raises(ValueError, match=named):
        meet(environment)


def test_a_rank_that_would_run_alone_is_told():
    check_size({}, 1)
    check_size(variables(0, 2), 2)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, and this rank would run alone: LOCAL_RANK is not set"):
        check_size(variables(0, 2), 1)
    with pytest.raises(ValueError, match="accelerate sees no GPU"):
        check_size(variables(0, 2, LOCAL_RANK="0"), 1)

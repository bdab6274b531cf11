"""An evaluation split over two real processes gives what one process gives, errors too."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.rank_processes import RANKS, join, leave, start_ranks
from helpers.support import tiny_model
from helpers.tiny_gallery import captions, evaluate, jpeg, tiny_records

from loopitr import TextState
from loopitr.data import LoadReport, Record, SceneRecords
from loopitr.distributed import each_rank, first_rank, rank


def broken(name: str) -> Record:
    return Record(image=jpeg(9)[:200], captions=captions(9, 3), identity=-9, name=name)


def one_broken(*, at: int) -> list[Record]:
    records = tiny_records(7)
    records.insert(at, broken(f"broken{at}.jpg"))
    return records


# Each name has records and options; rank 1's share is the second half.
CASES: dict[str, tuple[Sequence[Record], dict[str, Any]]] = {
    "even": (tiny_records(6), {}),
    "uneven": (tiny_records(7), {"image_block": 2, "pair_block": 5, "token_storage": "disk"}),
    "recompute": (tiny_records(7), {"token_storage": "recompute"}),
    "dual only": (tiny_records(7), {"rerank": 0}),
    "graded relevance": (SceneRecords("test", 9, image_size=32), {}),
    "fewer images than ranks": (tiny_records(1), {}),
    "one identity on both ranks": ([*tiny_records(5), replace(tiny_records(6)[5], identity=100)], {}),
    "broken on rank 0": (one_broken(at=1), {"max_skipped_fraction": 0.2}),
    "broken on rank 1": (one_broken(at=6), {"max_skipped_fraction": 0.2}),
    "all of rank 1 broken": ([*tiny_records(3), *map(broken, "abc")], {"max_skipped_fraction": 0.5}),
}
FAILING: dict[str, tuple[list[Record], dict[str, Any]]] = {
    "too many broken": (one_broken(at=6), {"max_skipped_fraction": 0.1}),
    "all broken": ([broken("only.jpg")], {"max_skipped_fraction": 1.0}),
}


def figures_of(records: Sequence[Record], options: dict[str, Any]) -> dict[str, Any]:
    """All of a result but its seconds."""
    return counted(records, options)[0]


def counted(records: Sequence[Record], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """`figures_of`, and how many images this process encoded and how many pairs it scored."""
    model, report, work = tiny_model(), LoadReport(), Counter[str]()
    model.dual.vision.register_forward_pre_hook(lambda _, args: work.update(images=len(args[0])))
    score = model.score_pairs
    model.score_pairs = lambda *args, **kwargs: work.update(pairs=len(args[2])) or score(*args, **kwargs)
    given = {"rerank": 4, "batch_size": 3, **options}
    result = evaluate(model, records, report=report, **given)
    json = {name: value for name, value in result.to_json().items() if name not in ("seconds", "pairs_per_second")}
    ranks = {name: [ranking.i2t.tolist(), ranking.t2i.tolist()] for name, ranking in result.rankings.items()}
    skips = {"counts": report.counts, "names": report.names, "gallery": result.skipped.summary()}
    return {"json": json, "ranks": ranks, **skips}, dict(work)


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class OfTwoArguments(ValueError):
    """As some libraries' errors, it cannot be read back from its pickle."""

    def __init__(self, message: str, *, table: str) -> None:
        super().__init__(f"{message} in {table}")


def fails_on(index: int, error: Exception) -> Any:
    def work() -> int:
        if rank() == index:
            raise error
        return rank()

    return work


def overflowing_on_rank_1() -> Any:
    """Only captions of rank 1's share have tokens beyond fp16."""
    model = tiny_model()
    encode = model.encode_texts

    def encode_texts(*args: Any) -> TextState:
        state = encode(*args)
        return replace(state, tokens=state.tokens * (1e6 if rank() == 1 else 1))

    model.encode_texts = encode_texts
    return evaluate(model, tiny_records(4), rerank=2, token_dtype="fp16")


def worker(index: int, folder: Path) -> None:
    join(index, folder)
    results: dict[str, Any] = {name: counted(*case) for name, case in CASES.items()}
    for name, case in FAILING.items():
        results[name] = error_of(lambda: figures_of(*case))
    results["overflow"] = error_of(overflowing_on_rank_1)
    results["each"] = each_rank(lambda: 10 + rank())
    results["first"] = first_rank(lambda: 10 + rank())
    results["value"] = error_of(lambda: each_rank(fails_on(1, ValueError("one"))))
    results["key"] = error_of(lambda: each_rank(fails_on(0, KeyError("zero"))))
    results["unusual"] = error_of(lambda: each_rank(fails_on(1, OfTwoArguments("four", table="five"))))
    results["of first"] = error_of(lambda: first_rank(fails_on(0, OSError("two"))))
    results["of nobody"] = first_rank(fails_on(1, OSError("three")))
    leave(index, folder, results)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return start_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_every_rank_returns_what_one_process_does(ranks, name):
    expected, work = counted(*CASES[name])
    assert [result[name][0] for result in ranks] == [expected] * RANKS
    shares = [Counter(result[name][1]) for result in ranks]
    assert shares[0] + shares[1] == work
    if "even" in name:
        assert abs(shares[0]["images"] - shares[1]["images"]) <= 1 and min(share["pairs"] for share in shares) > 0
    assert ("broken" in name) == bool(expected["counts"])


@pytest.mark.parametrize("name", FAILING)
def test_every_rank_raises_what_one_process_does(ranks, name):
    expected = error_of(lambda: figures_of(*FAILING[name]))
    assert expected.startswith("DataError: ") and ".jpg" in expected
    assert [result[name] for result in ranks] == [expected] * RANKS


def test_a_failure_of_one_rank_is_raised_on_all(ranks):
    for result in ranks:
        assert result["overflow"].startswith("DataError: caption '") and "fp16" in result["overflow"]
        assert result["value"] == "ValueError: one" and result["of first"] == "OSError: two"
        assert result["key"] == "RuntimeError: rank 0: KeyError: 'zero'"
        assert result["unusual"] == "ValueError: rank 1: OfTwoArguments: four in five"
        assert (result["each"], result["first"], result["of nobody"]) == ([10, 11], 10, 0)
    assert ranks[0]["overflow"] == ranks[1]["overflow"]


def test_alone_it_is_a_call():
    assert each_rank(lambda: 3) == [3] and first_rank(lambda: 4) == 4
    for alone in (each_rank, first_rank):
        with pytest.raises(KeyError):
            alone(fails_on(0, KeyError("as it is")))


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))

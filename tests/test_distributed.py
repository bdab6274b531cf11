"""Two real processes (gloo, DDP) give the gradient of one process on the concatenated batch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rank_processes import RANKS, join, leave, start_ranks
from helpers.step_reference import EveryThirdWord, model_of, step_batch

from loopitr.distributed import all_gather, all_gather_padded, all_sum, average_gradients, rank, world_size
from loopitr.objective.build import build_objective
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.mining import Mined, Miner
from loopitr.objective.options import ObjectiveOptions

SIZE = 5
# Image 0 and caption 2 are on both ranks, caption 1 twice on one rank; captions of ranks differ in length.
IDENTITIES = [0, 1, 2, 0, 3, 4, 0, 5, 6, 2]
CAPTIONS = [0, 1, 2, 3, 1, 4, 5, 6, 2, 7]


@dataclass(frozen=True)
class Case:
    style: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def uses_all(self) -> bool:
        return self.options.get("itm", 1.0) > 0

    def objective(self, *, in_blocks: bool = False) -> LoopObjective:
        options = ObjectiveOptions(**{"num_negatives": 3, "itc": 0.7, "itm": 1.3, "distillation": 2.0, **self.options})
        model = model_of(options, style=self.style)
        with torch.no_grad():
            model.itm_head.weight.mul_(30)  # This spreads the match scores out.
        objective = build_objective(model, options, masking=EveryThirdWord())
        if in_blocks:
            objective.miner = BlockMining(objective.miner)
        return objective


CASES = {
    "across_cprd": Case("late", {"mine_across_ranks": True}),
    "across_kl_mlm": Case("shared", {"mine_across_ranks": True, "distillation_loss": "kl", "mlm": 1.5}),
    "across_few": Case("late", {"mine_across_ranks": True, "distillation_loss": "kl", "num_negatives": 20}),
    "local_kl": Case("late", {"distillation_loss": "kl"}),
    "local_cprd_mlm": Case("shared", {"mlm": 1.5}),
    "local_distillation_only": Case("late", {"itc": 0.0, "itm": 0.0, "distillation_loss": "kl"}),
    "across_distillation_only": Case("late", {"itc": 0.0, "itm": 0.0, "mine_across_ranks": True}),
    "itc_only": Case("late", {"itm": 0.0, "distillation": 0.0}),
    "sigmoid": Case("late", {"itc_loss": "sigmoid", "distillation_loss": "kl"}),
    "itc_at_prefixes": Case("late", {"itm": 0.0, "distillation": 0.0, "matryoshka_dims": [3, 8]}),
    "sigmoid_at_prefixes": Case("late", {"itc_loss": "sigmoid", "distillation_loss": "kl", "matryoshka_dims": [4]}),
    "structure": Case("late", {"itm": 0.0, "distillation": 0.0, "cmd": 0.6, "cmc": 0.8}),
    "local_agreement": Case("late", {"distillation_loss": "kl", "agreement": 0.8}),
    "local_momentum": Case("late", {"teacher": "momentum", "distillation_loss": "kl"}),
    "across_momentum_only": Case(
        "shared", {"mine_across_ranks": True, "teacher": "momentum", "distillation_loss": "kl", "itc": 0.0, "itm": 0.0}
    ),
    "local_sum": Case(
        "late", {"train_on_sum": True, "sum_dropout": 0.0, "lce": 0.7, "teacher": "match_plus_similarity"}
    ),
    "across_agreement_mlm": Case("shared", {"mine_across_ranks": True, "agreement": 0.8, "mlm": 1.5}),
    "agreement_only": Case("late", {"itm": 0.0, "distillation": 0.0, "agreement": 0.8}),
    "structure_of_texts": Case("shared", {"cmd": 0.6, "cmc": 0.8, "structure_source": "text"}),
}


IN_CHUNKS = ("across_cprd", "local_kl", "itc_only", "local_agreement", "itc_at_prefixes")


def rank_batch(index: int) -> dict[str, torch.Tensor]:
    """This rank's rows, without the padding that only the other rank's captions need."""
    rows = slice(index * SIZE, (index + 1) * SIZE)
    batch = {key: value[rows] for key, value in whole_batch().items()}
    longest = int(batch["attention_mask"].sum(1).max())
    return {k: v[:, :longest] if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}


def whole_batch() -> dict[str, torch.Tensor]:
    return step_batch(IDENTITIES, CAPTIONS, longest=12)


# The side of the two processes


def check_gathers(index: int) -> dict[str, torch.Tensor]:
    mine = torch.full((2, 3), float(index + 1), requires_grad=True)
    beside = torch.zeros(4, 3, requires_grad=True)
    other = beside * 1  # It is computed before the gather, so that its backward runs after the gather's.
    weights = torch.arange(12.0).reshape(4, 3) * (index + 1)
    gathered = all_gather(mine, gradient=True)
    # The sum hands one and the same gradient tensor to both of its inputs.
    ((gathered + other) * weights).sum().backward()
    ragged = torch.full((2, 2 + index), float(index + 1), requires_grad=True)
    padded = all_gather_padded(ragged, gradient=True)
    (padded * (index + 1)).sum().backward()
    half = torch.full((1, 2), index + 0.5, dtype=torch.bfloat16, requires_grad=True)
    all_gather(half, gradient=True).sum().backward()
    return {
        "gathered": gathered.detach(),
        "gradient": mine.grad,
        "beside": beside.grad,
        "padded": padded.detach(),
        "ragged_gradient": ragged.grad,
        "half_gradient": half.grad,
        "bools": all_gather(torch.tensor([index == 0, True])),
        "without": all_gather(mine),
        "sum": all_sum(torch.tensor(index + 1)),
        "rank": torch.tensor([rank(), world_size()]),
    }


def worker(index: int, folder: Path) -> None:
    join(index, folder)
    results: dict[str, Any] = {"gathers": check_gathers(index)}
    for name, case in CASES.items():
        objective = case.objective()
        wrapped = torch.nn.parallel.DistributedDataParallel(objective, find_unused_parameters=not case.uses_all)
        out = wrapped(**rank_batch(index))
        out.loss.backward()
        results[name] = {
            "loss": out.loss.detach(),
            "terms": {key: value.detach() for key, value in out.terms.items()},
            "metrics": out.metrics,
            "gradients": {n: p.grad for n, p in objective.model.named_parameters() if p.grad is not None},
        }
        if name in IN_CHUNKS:
            chunked = case.objective()
            cached_backward(chunked, rank_batch(index), chunk_size=2)
            average_gradients(chunked.parameters())
            actual = {n: p.grad for n, p in chunked.model.named_parameters() if p.grad is not None}
            results[name]["chunked_gradients"] = actual
    leave(index, folder, results)


# The side of the one process


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank got, for all cases, from one launch."""
    return start_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@dataclass(frozen=True)
class BlockMining:
    """One process that mines as the ranks do: each block of rows in its own block of columns."""

    miner: Miner

    @property
    def num_negatives(self) -> int:
        return self.miner.num_negatives

    def __call__(self, similarity: torch.Tensor, positives: torch.Tensor, groups: torch.Tensor) -> Mined:
        blocks = [slice(start, start + SIZE) for start in range(0, len(groups), SIZE)]
        mined = [self.miner(similarity[b, b], positives[b, b], groups[b]) for b in blocks]
        indices = torch.cat([m.indices + b.start for m, b in zip(mined, blocks, strict=True)])
        return Mined(indices, torch.cat([m.valid for m in mined]))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_on_the_concatenated_batch(ranks, name):
    case = CASES[name]
    objective = case.objective(in_blocks=not case.options.get("mine_across_ranks"))
    out = objective(**whole_batch())
    out.loss.backward()
    results = [result[name] for result in ranks]

    # ITC, agreement and MLM are this rank's share, everything else is the same number on every rank.
    for term, value in out.terms.items():
        actual = torch.stack([result["terms"][term] for result in results])
        torch.testing.assert_close(actual.mean(), value.detach(), atol=1e-6, rtol=1e-5, msg=lambda m: f"{term}: {m}")
        assert value > 0
        if term in ("itm", "distillation", "cmd", "cmc"):
            assert actual[0] == actual[1]
    mean_loss = sum(result["loss"] for result in results) / RANKS
    torch.testing.assert_close(mean_loss, out.loss.detach(), atol=1e-6, rtol=1e-5)
    for metric, value in out.metrics.items():
        for result in results:
            torch.testing.assert_close(result["metrics"][metric], value, atol=1e-6, rtol=1e-5)

    expected = {n: p.grad for n, p in objective.model.named_parameters() if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for result in results:
        for kind in ("gradients", "chunked_gradients") if name in IN_CHUNKS else ("gradients",):
            for key, gradient in expected.items():
                error = float((result[kind][key] - gradient).abs().max())
                assert error <= 1e-5 * max(float(gradient.abs().max()), 0.01 * largest), (kind, key, error)
        for key in result["gradients"].keys() - expected.keys():  # DDP fills in zeros
            assert not result["gradients"][key].any()


def test_the_cases_would_show_a_difference():
    """Mining in blocks, and leaving out a gradient or a twin across ranks, must not look like the whole."""
    case = CASES["across_cprd"]
    whole, blocks = (case.objective(in_blocks=blocks)(**whole_batch()) for blocks in (False, True))
    assert (whole.terms["itm"] - blocks.terms["itm"]).abs() > 1e-3
    batches = [rank_batch(index) for index in range(RANKS)]
    assert batches[0]["input_ids"].shape[1] != batches[1]["input_ids"].shape[1]
    masked = [EveryThirdWord()(batch["input_ids"], batch["attention_mask"])[1] != -100 for batch in batches]
    counts = [int(chosen.sum()) for chosen in masked]
    assert counts[0] != counts[1] and min(counts) > 0


def test_gathers(ranks):
    first, second = (result["gathers"] for result in ranks)
    rows = torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None].expand(4, 3)
    weights = torch.arange(12.0).reshape(4, 3)
    for index, result in enumerate((first, second)):
        assert torch.equal(result["gathered"], rows) and torch.equal(result["without"], rows)
        # The gradient is summed over ranks: 1 + 2.
        assert torch.equal(result["gradient"], 3 * weights[2 * index : 2 * index + 2])
        assert torch.equal(result["beside"], (index + 1) * weights)  # The gradient that others get stays what it was.
        expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
        assert torch.equal(result["padded"], expected)
        assert torch.equal(result["ragged_gradient"], torch.full((2, 2 + index), 3.0))
        assert torch.equal(result["half_gradient"], torch.full((1, 2), 2.0, dtype=torch.bfloat16))
        assert result["bools"].tolist() == [True, True, False, True]
        assert result["sum"] == 3 and result["rank"].tolist() == [index, 2]


def test_everything_is_the_identity_when_not_distributed():
    x = torch.randn(2, 3, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert all_gather(x) is x and all_gather(x, gradient=True) is x and all_gather_padded(x, gradient=True) is x
    total = all_sum(x)
    assert torch.equal(total, x) and not total.requires_grad


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))

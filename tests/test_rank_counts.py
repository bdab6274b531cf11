"""One process, two and four: the same loss and the same gradient of one global batch, in float64, for drawn objectives,
under DDP and under FSDP 2.

The rows are parted among the ranks at random, so that ranks bring batches of different sizes.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import is_torch_version
from helpers.rank_processes import join, leave, start_ranks
from helpers.step_reference import EveryThirdWord, model_of, step_batch
from torch.nn.parallel import DistributedDataParallel

from loopitr.distributed import all_gather, all_gather_padded, average_gradients, rank, rows_of_ranks, world_size
from loopitr.objective.build import build_objective
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.mining import Mined, Miner
from loopitr.objective.options import ObjectiveOptions
from loopitr.objective.parts import StepOutput
from loopitr.training.sharding import MIN_TORCH, vectors_for_scalars, whole, whole_layers

pytestmark = pytest.mark.slow

SIZE, CASES = 13, 21
TOLERANCE = 1e-9  # of the largest entry of a gradient; the project asks for 1e-6
SCALARS = {"dual.logit_scale", "dual.logit_bias", "agreement.logit_scale"}
CHOICES: dict[str, tuple[Any, ...]] = {
    "itc": (0.0, 0.7, 0.7),
    "itc_loss": ("softmax", "softmax", "sigmoid"),
    "itm": (0.0, 1.3, 1.3),
    "balance_itm": (True, False),
    "lce": (0.0, 0.6),
    "distillation": (0.0, 2.0, 2.0),
    "distillation_loss": ("kl", "cprd", "margin_mse", "ranknet", "listnet", "listmle", "adr_mse"),
    "hard_rule": ("threshold", "mean", "top"),
    "teacher": ("match", "match", "match_plus_similarity", "momentum"),
    "train_on_sum": (False, False, True),
    "mlm": (0.0, 1.5),
    "agreement": (0.0, 0.8),
    "cmd": (0.0, 0.0, 0.6),
    "cmc": (0.0, 0.0, 0.8),
    "structure_source": ("image", "text"),
    "num_negatives": (1, 3, 20),
    "mine_across_ranks": (False, True),
    "distillation_trains": ("all", "projections"),
}


@dataclass(frozen=True)
class Case:
    """An objective and a batch, drawn by a number; the odd ones mine across ranks, so that both ways are drawn."""

    seed: int

    @property
    def options(self) -> ObjectiveOptions:
        draw = random.Random(self.seed)
        chosen = {name: draw.choice(values) for name, values in CHOICES.items()}
        chosen["distillation_loss"] = CHOICES["distillation_loss"][self.seed % 7]
        if not any(chosen[name] for name in ("itc", "itm", "lce", "distillation", "mlm", "agreement", "cmd", "cmc")):
            chosen["itc"] = 1.0
        if chosen["itc"] and self.seed % 3 == 0:
            chosen["matryoshka_dims"] = [5, 8]
        return ObjectiveOptions(**{**chosen, "mine_across_ranks": bool(self.seed % 2)}, sum_dropout=0.0)

    @property
    def chunk_size(self) -> int | None:
        return 2 if self.seed % 5 == 0 else None

    def objective(self) -> LoopObjective:
        model = model_of(self.options, style=("late", "shared")[self.seed // 2 % 2], seed=self.seed)
        with torch.no_grad():
            model.itm_head.weight.mul_(30)  # This spreads the match scores out.
        return build_objective(model.double(), self.options, masking=EveryThirdWord()).double()

    def batch(self) -> dict[str, torch.Tensor]:
        """Some images are in several rows, and so are some captions."""
        draw = random.Random(self.seed)
        identities = [draw.randrange(row + 1) if draw.random() < 0.3 else row for row in range(SIZE)]
        captions = [draw.randrange(row + 1) if draw.random() < 0.3 else row for row in range(SIZE)]
        batch = step_batch(identities, captions, longest=12)
        return {**batch, "pixel_values": batch["pixel_values"].double()}

    def sizes(self, ranks: int) -> list[int]:
        """At least one row for each rank."""
        ends = sorted(random.Random(self.seed).sample(range(1, SIZE), ranks - 1))
        return [end - start for start, end in zip([0, *ends], [*ends, SIZE])]

    def rows(self, index: int, ranks: int) -> slice:
        start = sum(self.sizes(ranks)[:index])
        return slice(start, start + self.sizes(ranks)[index])

    def part(self, index: int, ranks: int) -> dict[str, torch.Tensor]:
        """A rank's rows, without the padding that only other ranks' captions need."""
        batch = {key: value[self.rows(index, ranks)] for key, value in self.batch().items()}
        longest = int(batch["attention_mask"].sum(1).max())
        return {k: v[:, :longest] if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}


def gradients_of(objective: LoopObjective) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in objective.model.named_parameters() if p.grad is not None}


def sharded_gradients(case: Case, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under FSDP 2, as accelerate shards an objective: layers that run as wholes, then what is left."""
    from torch.distributed.fsdp import fully_shard  # MIN_TORCH has it, older versions do not.

    objective = case.objective()
    vectors_for_scalars(objective)
    layers = whole_layers(objective.model)
    for module in objective.modules():
        if type(module).__name__ in layers:
            fully_shard(module)
    fully_shard(objective)
    objective(**batch).loss.backward()
    gradients = {name: whole(gradient) for name, gradient in gradients_of(objective).items()}
    return {name: g.reshape(()) if name in SCALARS else g for name, g in gradients.items()}


def worker(index: int, folder: Path) -> None:
    join(index, folder)
    ranks = world_size()
    results: dict[int, Any] = {}
    for seed in range(CASES):
        case = Case(seed)
        objective = case.objective()
        if case.chunk_size is None:
            wrapped = DistributedDataParallel(objective, find_unused_parameters=True)  # It averages while it lives.
            out: StepOutput = wrapped(**case.part(index, ranks))
            out.loss.backward()
        else:
            out = cached_backward(objective, case.part(index, ranks), chunk_size=case.chunk_size)
            average_gradients(objective.parameters())
        terms = {name: value.detach() for name, value in out.terms.items()}
        results[seed] = {"loss": out.loss.detach(), "terms": terms, "gradients": [gradients_of(objective)]}
        if is_torch_version(">=", MIN_TORCH) and case.chunk_size is None and objective.own_teacher is None:
            results[seed]["gradients"].append(sharded_gradients(case, case.part(index, ranks)))
    mine = torch.arange(2.0 * (index + 1), dtype=torch.float64).reshape(index + 1, 2).requires_grad_()
    rows = rows_of_ranks(mine)
    gathered = all_gather(mine, gradient=True, rows=rows)
    ragged = all_gather_padded(torch.ones(index + 1, 1 + index % 2, 3), rows=rows)
    (gathered * (1 + rank())).sum().backward()
    gathers = {"rows": rows, "gathered": gathered.detach(), "ragged": ragged, "gradient": mine.grad}
    leave(index, folder, {"steps": results, "gathers": gathers})


@dataclass(frozen=True)
class BlockMining:
    """One process that mines as ranks do: each block of rows in its own block of columns."""

    miner: Miner
    sizes: list[int]

    @property
    def num_negatives(self) -> int:
        return self.miner.num_negatives

    def __call__(self, similarity: torch.Tensor, positives: torch.Tensor, groups: torch.Tensor) -> Mined:
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        blocks = [slice(start, start + size) for start, size in zip(starts, self.sizes)]
        mined = [self.miner(similarity[b, b], positives[b, b], groups[b]) for b in blocks]
        indices = torch.cat([m.indices + b.start for m, b in zip(mined, blocks)])
        return Mined(indices, torch.cat([m.valid for m in mined]))


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank got, for all cases, from one launch."""
    return start_ranks(__file__, tmp_path_factory.mktemp("ranks"), ranks=request.param)


def test_ranks_are_one_process_on_the_whole_batch(ranks):
    worst, seen = 0.0, set()
    for seed in range(CASES):
        case = Case(seed)
        objective = case.objective()
        if not case.options.mine_across_ranks:
            objective.miner = BlockMining(objective.miner, case.sizes(len(ranks)))
        out = objective(**case.batch())
        out.loss.backward()
        seen |= set(out.terms)
        results = [result["steps"][seed] for result in ranks]
        loss = sum(result["loss"] for result in results) / len(ranks)
        torch.testing.assert_close(loss, out.loss.detach(), atol=1e-10, rtol=1e-10, msg=lambda m: f"{case}: {m}")
        for name, value in out.terms.items():
            mean = sum(result["terms"][name] for result in results) / len(ranks)
            torch.testing.assert_close(
                mean, value.detach(), atol=1e-10, rtol=1e-10, msg=lambda m: f"{case}, {name}: {m}"
            )
        expected = gradients_of(objective)
        for actual in (gradients for result in results for gradients in result["gradients"]):
            left_alone = actual.keys() - expected.keys()  # DDP fills in zeros
            assert not any(actual[name].any() for name in left_alone), case
            largest = max(float(gradient.abs().max()) for gradient in expected.values())
            for name, gradient in expected.items():
                size = max(float(gradient.abs().max()), 1e-6 * largest)
                worst = max(worst, float((actual[name] - gradient).abs().max()) / size)
    assert seen == {"itc", "itm", "lce", "distillation", "mlm", "agreement", "cmd", "cmc"}
    assert worst <= TOLERANCE
    print(f"largest relative difference of a gradient: {worst:.1e}")


def test_gathers_of_different_sizes(ranks):
    count = len(ranks)
    for index, result in enumerate(ranks):
        gathers = result["gathers"]
        assert gathers["rows"] == [number + 1 for number in range(count)]
        parts = [torch.arange(2.0 * (number + 1), dtype=torch.float64).reshape(-1, 2) for number in range(count)]
        assert torch.equal(gathers["gathered"], torch.cat(parts))
        assert gathers["ragged"].shape == (sum(gathers["rows"]), 2, 3)
        assert torch.equal(
            gathers["gradient"], torch.full((index + 1, 2), sum(range(1, count + 1)), dtype=torch.float64)
        )


def test_the_cases_would_show_a_difference():
    """The mean of ranks' means is not that over all rows, and mining in blocks is not mining in the whole."""
    case = next(case for case in map(Case, range(CASES)) if case.options.itc and case.options.itc_loss == "softmax")
    sizes = case.sizes(2)
    assert sizes[0] != sizes[1]
    options = [Case(seed).options for seed in range(CASES)]
    for name, values in CHOICES.items():
        assert {getattr(option, name) for option in options} == set(values), name


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))

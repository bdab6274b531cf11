"""FSDP 2 on two gloo ranks: what it trains is what DDP trains, and what it saves is whole."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, is_torch_version
from helpers.rank_processes import RANKS, join, leave, start_ranks
from helpers.support import tiny_model
from helpers.tiny_run import (
    NO_AUGMENTATION,
    NO_DROPOUT,
    VIT,
    logged,
    make_trainer,
    reset_accelerate,
    run,
    tiny_options,
    weights,
    without_curves,
)
from torch import nn

from loopitr import LoopITRModel
from loopitr.training.sharding import MIN_TORCH, check_sharding, ready_for_ranks, vectors_for_scalars, whole_layers
from loopitr.training.trainer import Trainer

SMALL: dict[str, Any] = {
    **NO_AUGMENTATION,
    **NO_DROPOUT,
    "data__scenes_train": 32,
    "data__scenes_val": 8,
    "train__max_steps": 2,
    "validation__final_rerank": 4,
}
ALL_TERMS: dict[str, Any] = {
    **VIT,
    "model__fusion__agreement": True,
    "objective__agreement": 0.5,
    "objective__mlm": 1.0,
    "objective__mine_across_ranks": True,
}
CASES: dict[str, dict[str, Any]] = {
    "all terms": ALL_TERMS,
    # The gradient's norm is far above the limit, so each step is as long as the norm says. An epoch has five batches,
    # the last of which does not fill a step.
    "clipped, accumulated": {
        **VIT,
        "train__clip": 0.01,
        "train__accumulation": 2,
        "train__batch_size": 4,
        "data__scenes_train": 40,
        "train__max_steps": 4,
    },
    "batch statistics, shared layers": {"model__fusion__style": "shared"},
    "adapters": {**VIT, "model__lora__text_rank": 2, "model__fusion__style": "shared"},
    "gate, frozen": {
        "model__freeze": ["vision"],
        "objective__teacher": "match_plus_similarity",
        "objective__teacher_margin": -100,
        "validation__every_steps": 1,
    },
    "layer by layer": {**ALL_TERMS, "train__gradient_checkpointing": True},
}
LAYERS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
LONG = {**ALL_TERMS, "train__max_steps": 5, "train__epochs": 3, "train__checkpoint_every": 3}
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


# The side of the two processes


def train(folder: Path, *, sharded: bool, **changes: Any) -> None:
    """accelerate takes the ranks as they are, and parts them when the run ends."""
    for name in [name for name in os.environ if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"]:
        del os.environ[name]
    if sharded:
        os.environ.update(SHARDED | (LAYERS if "layer by layer" in folder.name else {}))
    meeting = folder / ("resumed" if changes.get("resume") else "begun")
    meeting.mkdir(parents=True, exist_ok=True)
    join(int(os.environ["RANK"]), meeting)
    reset_accelerate()
    with without_curves():
        make_trainer(tiny_options(folder, **{**SMALL, **changes})).run()


def train_in_two_goes(folder: Path) -> None:
    step = Trainer._step

    def stops(self: Trainer) -> None:
        step(self)
        if self.progress.step == 4:
            raise KeyboardInterrupt

    Trainer._step = stops  # type: ignore[method-assign]
    try:
        train(folder, sharded=True, **LONG)
    except KeyboardInterrupt:
        torch.distributed.destroy_process_group()
    finally:
        Trainer._step = step  # type: ignore[method-assign]
    train(folder, sharded=True, **LONG, resume=True)


def worker(index: int, folder: Path) -> None:
    ranks = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({"ACCELERATE_USE_CPU": "true", **{name: str(value) for name, value in ranks.items()}})
    for name, changes in CASES.items():
        train(folder / "fsdp" / name, sharded=True, **changes)
        train(folder / "ddp" / name, sharded=False, **changes)
    train(folder / "whole", sharded=True, **LONG)
    train_in_two_goes(folder / "parts")
    join(index, folder)
    leave(index, folder, {})


# The side of the test


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    if not is_torch_version(">=", MIN_TORCH):
        pytest.skip(f"FSDP needs torch {MIN_TORCH}")
    folder = tmp_path_factory.mktemp("runs")
    start_ranks(__file__, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sharded_training_is_that_of_ddp(runs, case):
    """Up to the order of sums: the losses to 1e-5, the weights to 1e-5 of a step of 1e-3."""
    sharded, ddp = runs / "fsdp" / case, runs / "ddp" / case
    names = {name for row in json_lines(ddp / "run" / "history.jsonl") for name in row}
    assert {"loss/total", "loss/itc", "loss/itm", "train/temperature", "val/dual"} <= names
    for name in names:
        torch.testing.assert_close(logged(sharded, name), logged(ddp, name), rtol=1e-5, atol=1e-6)
    actual, expected = weights(sharded), weights(ddp)
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():  # scalars too
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=1e-6)
    assert LoopITRModel.from_pretrained(sharded / "run").dual.logit_scale.shape == ()


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly(runs):
    whole, parts = runs / "whole" / "run", runs / "parts" / "run"
    for name in ("history.jsonl", "model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    files = {path.name for path in (whole / "checkpoints" / "step-00000005").iterdir()}
    assert {"pytorch_model_fsdp.bin", "optimizer.bin", "manifest.json", "progress.json"} <= files
    assert not [name for name in files if "distcp" in name]  # which would be unpickled


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_rank_draws_its_own_dropout_and_the_first_that_of_a_process_alone():
    def drawn(rank: int, seed: int) -> list[float]:
        torch.manual_seed(seed)  # as every rank begins, for equal weights
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=3, device=torch.device("cpu"), distributed_type=DistributedType.MULTI_CPU
        )
        ready_for_ranks(nn.Identity(), accelerator, seed=seed)
        return torch.rand(3).tolist()

    draws = {(rank, seed): drawn(rank, seed) for seed in (0, 1) for rank in range(3)}
    torch.manual_seed(1)
    assert draws[0, 1] == torch.rand(3).tolist()
    assert len({*map(tuple, draws.values())}) == 6 and drawn(2, 1) == draws[2, 1]


def test_scalars_become_vectors_of_one_that_are_trained_as_before():
    module = nn.Module()
    module.scale, module.still = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0), False)
    module.matrix = matrix = nn.Parameter(torch.eye(2))
    vectors_for_scalars(module)
    assert module.scale.tolist() == [2.0] and module.still.tolist() == [3.0] and module.matrix is matrix
    assert [parameter.requires_grad for parameter in (module.scale, module.still)] == [True, False]


@pytest.mark.parametrize(("style", "classes"), [("late", ["BertLayer", "Block"]), ("shared", ["Block"])])
def test_layers_whose_parts_are_used_alone_are_not_gathered_one_by_one(style, classes):
    assert whole_layers(tiny_model(style=style)) == classes


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP 1 is not supported: launch with --fsdp_version 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "FSDP can wrap layers, not parts by size"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP's offloading of weights to the CPU is not supported"),
        ({}, "FSDP shards over processes, and this is the only one"),
        ({}, "FSDP needs torch 99 or newer, this is"),
    ],
)
def test_what_fsdp_cannot_do_is_one_line(tmp_path, monkeypatch, variables, said):
    for name, value in {**SHARDED, **variables}.items():
        monkeypatch.setenv(name, value)
    for name in ("FSDP_STATE_DICT_TYPE", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "")  # so that it is as before when the test is over
    monkeypatch.setattr("loopitr.training.sharding.MIN_TORCH", "99" if "torch 99" in said else "2.0")
    with pytest.raises(ValueError, match=said):
        run(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_a_model_of_its_own_does_not_go_with_sharded_weights():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    check_sharding(SimpleNamespace(own_teacher=None), accelerator)
    with pytest.raises(ValueError, match="objective.teacher 'momentum' works with DDP, not with FSDP"):
        check_sharding(SimpleNamespace(own_teacher=SimpleNamespace(name="momentum")), accelerator)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))

"""Streams in training: their order, their parts by rank, and ranks that reach the end at different batches."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
from accelerate import Accelerator
from helpers.recipe_process import forked
from helpers.tiny_gallery import captions, jpeg
from helpers.tiny_run import VIT, equal, logged, trainer, weights, without_curves, write_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, quick_streams):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def stream(folder, *sizes):
    """Changes of `OPTIONS`: training files of so many images each, to be streamed."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    files = {f"train-{i}": range(a, a + n) for i, (a, n) in enumerate(zip(starts, sizes, strict=True))}
    for name, numbers in {**files, "val": range(100, 104)}.items():
        images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in numbers]
        columns = {"image": images, "caption": [list(captions(i, 2)) for i in numbers]}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
    return {
        **VIT,
        "data__hub": "parquet",
        "data__data_files": {"train": str(folder / "train-*.parquet"), "val": str(folder / "val.parquet")},
        "data__streaming": True,
        "train__batch_size": 2,
        "train__max_steps": 1,
    }


def order(trainer, epoch):
    return [identity for batch in trainer.loader.epoch(epoch) for identity in batch.inputs["identities"].tolist()]


@pytest.mark.slow
def test_a_stream_is_shuffled_by_seed_and_epoch(tmp_path):
    changes = stream(tmp_path, 16)
    with trainer(tmp_path / "a", **changes) as first:
        orders = [order(first, epoch) for epoch in (0, 1)]
    with trainer(tmp_path / "b", **changes) as second:
        assert [order(second, epoch) for epoch in (0, 1)] == orders
    with trainer(tmp_path / "c", **changes, data__shuffle_buffer=0) as plain:
        by_file = order(plain, 0)
        assert order(plain, 1) == by_file
    with trainer(tmp_path / "d", **changes, train__seed=1) as other:
        orders.append(order(other, 0))
    assert len({tuple(actual) for actual in [*orders, by_file]}) == 4  # All orders differ.
    assert all(sorted(actual) == sorted(by_file) for actual in orders) and len(set(by_file)) == 16


@pytest.mark.parametrize("sizes", [(8, 8), (16,)], ids=["by file", "by row"])
def test_ranks_part_a_stream(tmp_path, monkeypatch, sizes):
    changes, parts = stream(tmp_path, *sizes), []
    for rank in (0, 1):
        with monkeypatch.context() as two:
            two.setattr(Accelerator, "num_processes", 2)
            two.setattr(Accelerator, "process_index", rank)
            with trainer(tmp_path / str(rank), **changes) as made:
                parts.append(order(made, 0))
    assert [len(part) for part in parts] == [8, 8] and len({*parts[0], *parts[1]}) == 16


@pytest.mark.slow
def test_ranks_whose_streams_end_at_different_batches_accumulate_together_and_resume(tmp_path):
    """Epochs of 3 batches on one rank and of 5 on the other, in steps of 2: an epoch's end falls into a step."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {**stream(tmp_path, 7, 11), "train__accumulation": 2, "train__max_steps": 6}
    for folder in (whole, parts):
        folder.mkdir()
        write_config(folder, **changes, train__checkpoint_every=4)
    with without_curves():
        done = forked("pretrain.py", "--config", whole / "tiny.yaml", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = whole / "run" / "checkpoints" / "step-00000004"
    assert json.loads((checkpoint / "progress.json").read_text())["places"] == [[2, 2], [1, 3]]  # 8 batches each
    (parts / "run").mkdir()
    shutil.copytree(checkpoint, parts / "run" / "checkpoints" / checkpoint.name)
    for name in ("history.jsonl", "config.yaml"):
        shutil.copy(whole / "run" / name, parts / "run")
    with without_curves():
        done = forked("pretrain.py", "--config", parts / "tiny.yaml", "--resume", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(parts, "loss/total") == logged(whole, "loss/total") and len(logged(whole, "loss/total")) == 6
    assert equal(weights(parts), weights(whole))

"""`accelerate launch recipes/pretrain.py` as its users start it: one process, two, killed, resumed, fine-tuned."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.forked_run import start
from helpers.recipe_process import (
    ACCELERATE,
    ROOT,
    TWO_ON_CPU,
    call,
    error_lines,
    forked,
    launch,
    run_here,
)
from helpers.tiny_run import (
    NO_AUGMENTATION,
    NO_DROPOUT,
    VIT,
    broken_table,
    equal,
    logged,
    reset_accelerate,
    run,
    weights,
    without_curves,
    write_config,
    write_table,
)
from helpers.waiting import wait, wait_until
from safetensors.torch import load_file
from transformers import AutoModel

from loopitr import LoopITRModel
from loopitr.training.reporting import read_history

STEPS = 2
# Nothing random but the order of the data: what one process does, two must do.
EXACT = {
    **VIT,
    **NO_DROPOUT,
    **NO_AUGMENTATION,
    "objective__mining": "topk",
    "objective__mine_across_ranks": True,
    "train__max_steps": STEPS,
    "train__checkpoint_every": STEPS,
    "train__warmup": 0.0,
    "train__distillation_warmup": 0.0,
    "validation__every_epochs": 0,
}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of one process: `.folder / "run"`, and `.done`, the process."""
    folder = tmp_path_factory.mktemp("first")
    config = write_config(folder, **EXACT, train__batch_size=8, train__tracker="auto")
    return SimpleNamespace(folder=folder, done=forked("pretrain.py", "--config", config))


def test_one_process_leaves_a_run_folder(first):
    assert first.done.returncode == 0, first.done.stderr
    folder = first.folder / "run"
    names = {
        "config.json",
        "model.safetensors",
        "config.yaml",
        "metrics.json",
        "results.md",
        "gallery.html",
        "history.jsonl",
    }
    assert names <= {path.name for path in folder.iterdir()}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["split"], metrics["num_images"], metrics["training"]["steps"]) == ("test", 16, STEPS)
    assert [row["step"] for row in read_history(folder) if "loss/total" in row] == [1, 2]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["batch_size"] == 8
    if importlib.util.find_spec("tensorboard"):
        assert list(folder.rglob("events.out.tfevents*"))


def test_it_shows_named_losses_and_prints_the_table_that_it_saves(first):
    bars = [line for line in first.done.stderr.replace("\r", "\n").splitlines() if line.startswith("training:")]
    assert all(f"{name}=" in bars[-1] for name in ("total", "itc", "itm", "distillation")) and "2/2" in bars[-1]
    table = [line for line in first.done.stdout.splitlines() if line.startswith("|")]
    heads = [row.split("|")[1].strip() for row in table[2:]]
    assert heads[:3] == ["dual", "match", "match + similarity"] and heads[3].startswith("reranked (")
    assert table == [
        line for line in (first.folder / "run" / "results.md").read_text().splitlines() if line.startswith("|")
    ]


def test_its_model_is_loadable(first):
    model, auto = (kind.from_pretrained(first.folder / "run") for kind in (LoopITRModel, AutoModel))
    assert type(auto) is LoopITRModel and not model.training
    saved = weights(first.folder)
    assert equal({name: value for name, value in auto.state_dict().items() if name in saved}, saved)


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(first, tmp_path):
    """4 x 2 as 8 x 1: the same batches, losses and weights."""
    config = write_config(tmp_path, **EXACT, train__batch_size=4)
    done = launch("pretrain.py", "--config", config, launcher=TWO_ON_CPU)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained; 2 steps of 4 x 2 x 1") == 1  # one of them speaks
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert {path.name for path in checkpoint.glob("random_states_*")} == {f"random_states_{i}.pkl" for i in (0, 1)}
    for name in ("loss/itm", "loss/distillation", "train/valid_length"):  # `loss/itc` is of a rank's own queries
        assert logged(tmp_path, name) == pytest.approx(logged(first.folder, name), abs=1e-5)
    run(tmp_path / "start", **{**EXACT, "train__max_steps": None, "train__epochs": 0, "train__checkpoint_every": 0})
    start, one, two = (weights(folder) for folder in (tmp_path / "start", first.folder, tmp_path))
    moved = [name for name in one if not torch.equal(one[name], start[name])]
    assert len(moved) > 0.9 * len(one)
    for name in moved:
        if not name.endswith("key.bias"):  # The gradient of these is zero but for rounding, which Adam makes large.
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.slow
def test_two_processes_validate_as_one(tmp_path):
    """Untrained, so that the weights are the same; one of the images is broken."""
    changes = {**VIT, **broken_table(tmp_path), "train__epochs": 0}
    expected = run(tmp_path / "one", **changes)
    (tmp_path / "two").mkdir()
    config = write_config(tmp_path / "two", **changes)
    with without_curves():
        done = forked("pretrain.py", "--config", config, ranks=2)
    assert done.returncode == 0, done.stderr
    assert equal(weights(tmp_path / "one"), weights(tmp_path / "two"))
    actual = json.loads((tmp_path / "two" / "run" / "metrics.json").read_text())
    for metrics in (expected, actual):
        del metrics["seconds"], metrics["pairs_per_second"], metrics["training"]["seconds"]
    assert actual == expected and actual["num_images"] == 7 and sum(actual["skipped"].values()) == 1
    assert read_history(tmp_path / "one" / "run") == read_history(tmp_path / "two" / "run")
    assert done.stdout.count("| dual ") == 1 and done.stdout.count("step 0: mean R@1") == 1  # one of them speaks


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(tmp_path):
    """Dropout and augmentation on."""
    changes = {"train__epochs": 4, "train__checkpoint_every": 4}  # 32 steps
    run(tmp_path / "whole", **changes)
    pid = start(tmp_path / "parts", tmp_path / "output", **changes)
    checkpoint = tmp_path / "parts" / "run" / "checkpoints" / "step-00000004"
    try:
        wait_until(checkpoint.exists)
    finally:
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL, (tmp_path / "output").read_text()
    assert not (tmp_path / "parts" / "run" / "metrics.json").exists()
    config = tmp_path / "parts" / "tiny.yaml"
    done = launch("pretrain.py", "--config", config, "--resume", launcher=ACCELERATE)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert logged(tmp_path / "whole", "loss/total") == logged(tmp_path / "parts", "loss/total")


@pytest.mark.slow
def test_fine_tuning_on_a_table_with_a_broken_image_and_a_missing_caption(first, tmp_path, monkeypatch, capsys):
    table = write_table(tmp_path / "table", {"train": range(12), "val": range(12, 16)}, broken=(5,))
    table.write_text(table.read_text() + "3.jpg,,train\n")
    given = {
        "--model.init": first.folder / "run",
        "--data.table": table,
        "--data.images": table.parent / "images",
        "--data.num_workers": 1,
        "--data.max_skipped_fraction": 0.2,
        "--train.output_dir": tmp_path / "run",
        "--train.batch_size": 4,
        "--train.epochs": 1,
        "--train.tracker": "none",
    }
    reset_accelerate()
    with without_curves():
        done = run_here(monkeypatch, capsys, "pretrain.py", *(word for pair in given.items() for word in pair))
    reset_accelerate()
    assert done.returncode == 0, done.stderr
    (read,) = [line for line in done.stdout.splitlines() if line.startswith("train: ")]
    assert read == "train: 12 images, 24 captions; skipped 1 x empty caption (3.jpg)"
    assert "skipped 5.jpg: unreadable image" in done.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sum(metrics["training"]["skipped"].values()) == 1 and metrics["num_images"] == 4
    assert metrics["training"]["steps"] == 3
    before, after = weights(first.folder), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys() and not equal(before, after)


# What is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--train.nonsense", "3"], "--train.nonsense"),
        (["--train.lr", "fast"], "train.lr"),
        (["--train.batch_size", "0"], "train.batch_size must be at least 1, got 0"),
        (["--objective.distillation_loss", "hinge"], "hinge"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.table", "nowhere.csv"], "nowhere.csv"),
        (["--data.scenes", "false"], "no data source is given"),
        (["--model.init", "nowhere"], "nowhere"),
        (["--data.split", "trian"], "no split 'trian'"),
        (["--train.batch_size", "100"], "64 training examples"),
        (["--model.vision.name", "resnet10tt"], "resnet10tt"),
        (
            ["--train.lr", "1e30", "--train.backbone_lr", "1e30", "--train.warmup", "0"],
            "in a row without a finite gradient: loss nan",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_an_error_is_one_line_that_names_the_culprit(tmp_path, monkeypatch, capsys, changes, named):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    reset_accelerate()
    status, errors = call(monkeypatch, capsys, "pretrain.py", "--config", write_config(tmp_path), *changes)
    reset_accelerate()
    assert status == 2
    (line,) = error_lines(errors)
    assert named in line


@pytest.mark.slow
def test_accelerate_passes_the_error_on(tmp_path):
    """Its own traceback, of the process that failed, cannot be avoided; there must be none of ours."""
    done = launch("pretrain.py", "--config", write_config(tmp_path), "--train.nonsense", 3, launcher=ACCELERATE)
    assert done.returncode != 0
    errors = done.stderr.splitlines()
    assert [line for line in errors if "error: " in line] == [line for line in errors if "--train.nonsense 3 (" in line]
    assert "loopitr/" not in done.stderr and done.stderr.count("Traceback") <= 1


@pytest.mark.parametrize("config", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_understood(config, monkeypatch, capsys):
    status, errors = call(monkeypatch, capsys, "pretrain.py", "--config", config, "--print_config")
    assert not status and not errors


def test_a_pair_alone_is_not_trained_with_the_options_of_the_scenes(monkeypatch, capsys):
    shown = run_here(monkeypatch, capsys, "pretrain.py", "--model.pair", "some/pair", "--print_config")
    assert shown.returncode == 0 and "pair: some/pair" in shown.stdout
    assert "name: scenes" not in shown.stdout and "fusion_start: 0.0" in shown.stdout

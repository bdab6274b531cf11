"""Runs that go on after an interruption, and runs that find an earlier one in their folder."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny_run import broken_table, equal, logged, run, weights
from safetensors.torch import load_file

from loopitr.durable import write_manifest
from loopitr.training import saving
from loopitr.training import trainer as training
from loopitr.training.reporting import read_history


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {"train__epochs": 2, "train__checkpoint_every": 3, "validation__every_steps": 4},
        pytest.param(
            {
                "train__epochs": 3,
                "train__checkpoint_every": 2,
                "train__accumulation": 3,
                "data__captions": "all",
                "train__batch_size": 24,
                "data__num_workers": 1,
            },
            marks=pytest.mark.slow,
        ),
        # Its checkpoints are at an epoch's end.
        pytest.param(
            {"train__epochs": 2, "train__checkpoint_every": 8, "objective__mining": "sample"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"train__epochs": 2, "train__checkpoint_every": 5, "model__freeze": ["vision"], "cache": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mid-epoch", "accumulation", "epoch end", "cached tokens"],
)
def test_an_interrupted_run_that_is_resumed_equals_one_that_was_not(tmp_path, monkeypatch, changes):
    """Dropout and augmentation on; weights, history and counts to the bit."""
    if changes.pop("cache", False):
        changes = {**changes, "data__cache_tokens": str(tmp_path / "cache")}
    elif "data__captions" not in changes:
        changes = {**changes, **broken_table(tmp_path), "train__batch_size": 3}  # 8 batches, and a broken image
    expected = run(tmp_path / "whole", **changes)
    save, saved = saving.save_checkpoint, []

    def killed_after_two(*args, **kwargs):
        saved.append(save(*args, **kwargs))
        if len(saved) == 2:
            raise Killed

    if changes["train__checkpoint_every"] == 8:
        saved.append(Path())  # Only one checkpoint is written before the last step.
    monkeypatch.setattr(saving, "save_checkpoint", killed_after_two)
    with pytest.raises(Killed):
        run(tmp_path / "parts", **changes)
    monkeypatch.undo()
    actual = run(tmp_path / "parts", **changes, resume=True)
    assert not (tmp_path / "parts" / "run.1").exists()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert read_history(tmp_path / "whole" / "run") == read_history(tmp_path / "parts" / "run")
    for metrics in (expected, actual):
        for name in ("seconds", "pairs_per_second"):
            metrics.pop(name)
        metrics["training"].pop("seconds")
    assert actual == expected


def test_resume_without_a_checkpoint_starts_from_scratch(tmp_path, capsys):
    run(tmp_path, train__max_steps=1, resume=True)
    assert "resuming from scratch: no checkpoint" in capsys.readouterr().out
    assert logged(tmp_path, "loss/total")


def everything(folder):
    """The content and the time of change of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.read_bytes(), path.stat().st_mtime_ns) for path in files]


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["its checkpoint", "no checkpoint"])
def test_a_finished_run_that_is_resumed_is_left_as_it_is(tmp_path, capsys, keep):
    first = run(tmp_path, train__max_steps=2)  # checkpoint_every is 0: the last one is written all the same
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    if keep == "no checkpoint":  # as runs before this rule left it
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = everything(tmp_path / "run")
    capsys.readouterr()
    assert run(tmp_path, train__max_steps=2, resume=True) == first
    assert everything(tmp_path / "run") == before and not (tmp_path / "run.1").exists()
    assert f"{tmp_path / 'run'} has made its 2 steps: nothing to resume" in capsys.readouterr().out


def test_a_finished_run_without_a_checkpoint_cannot_be_made_longer(tmp_path):
    run(tmp_path, train__max_steps=1)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = everything(tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint to make 2 from; start from its model with --model.init"):
        run(tmp_path, train__max_steps=2, resume_with_changes=True)
    assert everything(tmp_path / "run") == before


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_is_finished(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole", train__max_steps=2)

    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(training, "write_results", killed)
    with pytest.raises(Killed):
        run(tmp_path / "parts", train__max_steps=2)
    monkeypatch.undo()
    found = run(tmp_path / "parts", train__max_steps=2, resume=True)
    assert found["dual"] == expected["dual"] and equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert read_history(tmp_path / "whole" / "run") == read_history(tmp_path / "parts" / "run")


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_is_kept_when_it_starts_again(tmp_path, monkeypatch, capsys):
    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(saving, "save_checkpoint", killed)
    with pytest.raises(Killed):
        run(tmp_path, train__max_steps=2, validation__every_steps=1)
    monkeypatch.undo()
    model = weights(tmp_path)
    run(tmp_path, train__max_steps=2, validation__every_steps=1, resume=True)
    assert equal(load_file(tmp_path / "run.1" / "model.safetensors"), model)
    output = capsys.readouterr().out
    assert "resuming from scratch: no checkpoint" in output and "moved the earlier run" in output
    assert len(logged(tmp_path, "loss/total")) == 2


@pytest.mark.slow
def test_an_earlier_run_is_moved_aside_but_not_by_a_mistake(tmp_path, capsys):
    first = run(tmp_path, train__max_steps=1)
    for mistake in (
        {"data__table": "absent.csv"},
        {"model__init": "absent"},
        {"validation__final_split": "tset"},
        {"data__val_split": "absent"},
    ):
        with pytest.raises((ValueError, OSError)):
            run(tmp_path, **mistake)
        assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == first
    run(tmp_path, train__max_steps=2)
    assert json.loads((tmp_path / "run.1" / "metrics.json").read_text()) == first
    output = capsys.readouterr().out
    assert "moved the earlier run" in output and "to go on with it" not in output
    assert logged(tmp_path, "loss/total") != []
    (tmp_path / "run" / "metrics.json").unlink()  # As if it had been killed after a checkpoint.
    run(tmp_path, train__max_steps=1)
    assert f"to go on with it: --train.output_dir {tmp_path}/run.2 --resume\n" in capsys.readouterr().out


def test_a_resumed_run_finds_another_checkpoint_and_no_best_model(tmp_path, capsys):
    """A checkpoint that was copied from another run is refused; a model that is lost does not end a run at its end."""
    changes = {"train__max_steps": 2, "train__checkpoint_every": 1, "validation__every_steps": 1}
    run(tmp_path, **changes)
    folder = tmp_path / "run"
    (folder / "metrics.json").unlink()
    (folder / "model.safetensors").unlink()
    newest, first = (folder / "checkpoints" / f"step-0000000{step}" for step in (2, 1))
    config = newest / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 7"))
    write_manifest(newest)
    with pytest.raises(ValueError, match=r"train.seed: 7 -> 0 \(of step-00000002\)"):
        run(tmp_path, **changes, resume=True)
    shutil.rmtree(newest)
    capsys.readouterr()
    run(tmp_path, **changes, resume=True)
    assert "the best model so far, of step 1, is lost" in capsys.readouterr().out
    assert (folder / "model.safetensors").is_file() and first.is_dir()

"""When checkpoints are written, and runs on a full disk."""

import errno
import os

import pytest
from helpers.tiny_run import equal, run, weights

from loopitr import durable
from loopitr.training import checkpoints, reporting, saving
from loopitr.training import trainer as training
from loopitr.training.reporting import History, read_history

pytestmark = pytest.mark.slow

NO_SPACE = errno.ENOSPC


def full(*_, **__):
    raise OSError(NO_SPACE, os.strerror(NO_SPACE))


def saved_steps(monkeypatch):
    """The steps of all checkpoints, in the order in which they are written."""
    save, steps = saving.save_checkpoint, []

    def noted(accelerator, folder, progress, **kwargs):
        steps.append(progress.step)
        return save(accelerator, folder, progress, **kwargs)

    monkeypatch.setattr(saving, "save_checkpoint", noted)
    return steps


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train__checkpoint_every": 3}, [3, 6, 8, 9, 12, 15, 16]),
        ({"train__checkpoint_every": 4}, [4, 8, 12, 16]),  # at an epoch's end there is one, not two
        ({"train__checkpoint_every": 0}, [8, 16]),
        ({"train__checkpoint_every": 0, "train__max_steps": 10}, [8, 10]),
    ],
)
def test_there_is_one_every_so_many_steps_and_every_epoch(tmp_path, monkeypatch, changes, expected):
    steps = saved_steps(monkeypatch)
    run(tmp_path, train__epochs=2, validation__every_epochs=0, **changes)
    assert steps == expected


def test_there_is_one_every_so_many_minutes(tmp_path, monkeypatch):
    """A clock by which a step takes a minute."""
    steps, clock = saved_steps(monkeypatch), [0.0]
    step = training.Trainer._step

    def minute(self):
        step(self)
        clock[0] += 60

    monkeypatch.setattr(training.Trainer, "_step", minute)
    monkeypatch.setattr(saving.time, "monotonic", lambda: clock[0])
    run(tmp_path, train__epochs=2, train__checkpoint_minutes=3, validation__every_epochs=0)
    assert steps == [3, 6, 8, 11, 14, 16]


def test_a_full_disk_is_said_and_the_run_goes_on_until_it_has_space(tmp_path, monkeypatch, capsys):
    manifest, tries = checkpoints.write_manifest, []

    def sometimes(folder):
        tries.append(folder)
        if len(tries) in (2, 3):
            full()
        manifest(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", sometimes)
    run(tmp_path, train__max_steps=8, train__checkpoint_every=2, validation__every_epochs=0)
    folder = tmp_path / "run" / "checkpoints"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step")]
    assert said == [
        f"warning: step {step}: no checkpoint could be written to {folder} (No space left on device), the one of step "
        "2 is kept; the run continues and tries again"
        for step in (4, 6)
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000008"]


def test_the_last_checkpoint_has_to_be_written(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole", train__max_steps=4, train__checkpoint_every=2, validation__every_epochs=0)
    manifest, tries = checkpoints.write_manifest, []

    def once(folder):
        tries.append(folder)
        return manifest(folder) if len(tries) < 2 else full()

    monkeypatch.setattr(checkpoints, "write_manifest", once)
    changes = {"train__max_steps": 4, "train__checkpoint_every": 2, "validation__every_epochs": 0}
    with pytest.raises(OSError, match="step 4: no checkpoint .* the one of step 2 is kept; free space and"):
        run(tmp_path / "parts", **changes)
    monkeypatch.undo()
    assert run(tmp_path / "parts", **changes, resume=True)["dual"] == expected["dual"]
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_best_model_that_does_not_fit_leaves_the_earlier_one(tmp_path, monkeypatch):
    changes = {"train__max_steps": 4, "train__epochs": 2, "validation__every_steps": 2}
    kept = run(tmp_path / "a", **{**changes, "train__max_steps": 2})
    saves, before = [], durable.sync_all

    def second(folder):
        saves.append(folder)
        return before(folder) if len(saves) < 2 else full()

    monkeypatch.setattr(durable, "sync_all", second)
    monkeypatch.setattr("loopitr.training.validation.Validator.selected", "step")
    evaluate = training.Validator.evaluate

    def rising(self, *args, step, **kwargs):
        result = evaluate(self, *args, step=step, **kwargs)
        rises = result.mean_r1
        object.__setattr__(result, "mean_r1", lambda: {**rises(), "step": float(step)})
        return result

    monkeypatch.setattr(training.Validator, "evaluate", rising)
    with pytest.raises(OSError, match="No space left on device"):
        run(tmp_path / "b", **changes)
    assert kept and not list((tmp_path / "b" / "run").glob("*.partial")) and len(saves) == 2
    assert weights(tmp_path / "b")


def test_rows_that_a_full_disk_does_not_take_are_written_later(tmp_path, monkeypatch):
    lines: list[str] = []
    history = History(tmp_path, log=lines.append)
    history.add(1, {"a": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(reporting.Path, "open", full)
        history.add(2, {"a": 2.0})
        history.add(3, {"a": 3.0})
        with pytest.raises(OSError, match="No space"):
            history.sync()
    assert lines == [
        f"warning: {tmp_path / 'history.jsonl'} cannot be written (No space left on device); its rows are written later"
    ]
    assert [row["step"] for row in read_history(tmp_path)] == [1]
    history.add(4, {"a": 4.0})
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3, 4]

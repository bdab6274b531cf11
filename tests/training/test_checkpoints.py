"""Checkpoints are complete or absent, and bring everything back."""

import copy
import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from accelerate import Accelerator
from helpers.checkpointed import Work
from helpers.support import tiny_model
from helpers.tiny_run import equal, reset_accelerate
from torch import nn

from loopitr.durable import MANIFEST
from loopitr.objective.teachers import Frozen
from loopitr.training.checkpoints import STATE_FILE, Progress, load_checkpoint, save_checkpoint
from loopitr.training.optimization import warmup_cosine


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path):
    expected = Work().steps(9).state()
    Work().steps(6).save(tmp_path)
    resumed = Work(seed=7)
    progress = resumed.load(tmp_path)
    assert progress is not None and progress.step == 6
    actual = resumed.steps(3).state()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_options_of_the_optimiser_are_not_those_of_the_checkpoint(tmp_path):
    Work().steps(6).save(tmp_path)
    resumed = Work()
    resumed.schedule = warmup_cosine(resumed.optimizer.optimizer, steps=10, warmup=5)
    resumed.optimizer.param_groups[0].update(initial_lr=0.4, weight_decay=0.3)
    resumed.schedule.base_lrs = [0.4]
    resumed.load(tmp_path)
    (group,) = resumed.optimizer.param_groups
    expected = 0.4 * (1 + math.cos(math.pi / 5)) / 2  # a fifth of the way from step 5 to step 10
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(expected), 0.3)
    assert resumed.schedule.get_last_lr() == [group["lr"]] and float(resumed.steps(1).schedule.get_last_lr()[0]) > 0


def test_a_frozen_teacher_that_was_exchanged_stays(tmp_path):
    class Taught(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.teacher = Frozen(tiny_model(seed=seed), student=tiny_model())
            torch.manual_seed(seed)
            self.student = nn.Linear(2, 2)

    before, after = Taught(0), Taught(1)
    own, learned = copy.deepcopy(after.teacher.state_dict()), copy.deepcopy(before.student.state_dict())
    assert not equal(own, before.teacher.state_dict())
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(before)
    path = save_checkpoint(accelerator, tmp_path, Progress(step=1), keep=1)
    for teacher, expected in ((None, before.teacher.state_dict()), (after.teacher, own)):
        reset_accelerate()
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(after)
        load_checkpoint(accelerator, path, teacher=teacher)
        assert equal(after.student.state_dict(), learned) and equal(after.teacher.state_dict(), expected)
        after.teacher.load_state_dict(own)


def test_progress_comes_back_whole(tmp_path):
    progress = Progress(
        step=3,
        epoch=2,
        batch=1,
        best=12.5,
        best_dual=10.5,
        best_step=2,
        rows=9,
        skipped={"truncated": 2},
        skipped_files={"a.jpg": "truncated"},
        truncated=4,
        places=[[2, 1]],
        similarity_weight=0.5,
        teaching_since=2,
        has_taught=True,
        best_lead=3.0,
        windows=[{"loss/total": [0.1, 0.25]}],
        validates_next=True,
        bad_steps=3,
        bad_in_row=1,
        watch={"itm": 20.0},
        precision="no",
    )
    work = Work()
    work.save_progress(tmp_path, progress, keep=1)
    assert work.load(tmp_path) == progress
    assert all(value != getattr(Progress(), name) for name, value in asdict(progress).items())


def test_each_rank_gets_its_own_place_and_of_other_ranks_the_first(tmp_path):
    work = Work()
    state = work.save(tmp_path, epoch=2, batch=1) / STATE_FILE
    for places, expected in (([[7, 5]], (7, 5)), ([[2, 1], [3, 0]], (2, 1)), ([], (2, 1))):
        state.write_text(json.dumps({**json.loads(state.read_text()), "places": places}))
        (state.parent / MANIFEST).unlink(missing_ok=True)  # It would not be what was written.
        progress = work.load(tmp_path)
        assert (progress.epoch, progress.batch) == expected


def test_the_newest_is_loaded_and_older_ones_are_deleted(tmp_path):
    work = Work()
    for _ in range(5):
        work.steps(3).save(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000012", "step-00000015"]
    progress = work.load(tmp_path)
    assert progress is not None and progress.step == 15


def test_steps_are_ordered_as_numbers(tmp_path):
    work = Work()
    for work.step in (99_999_999, 7, 100):
        work.save(tmp_path, keep=3)
    shutil.rmtree(tmp_path / "step-99999999")
    progress = work.load(tmp_path)
    assert progress is not None and progress.step == 100


def test_a_killed_write_is_not_taken_for_a_checkpoint(tmp_path):
    work = Work().steps(2)
    done = work.save(tmp_path)
    later = tmp_path / "step-00000004.partial"
    shutil.copytree(done, later)  # The process was killed before the rename.
    torn = tmp_path / "step-00000005"
    shutil.copytree(done, torn)
    (torn / STATE_FILE).unlink()  # The folder is not one of ours, or it is half deleted.
    progress = work.load(tmp_path)
    assert progress is not None and progress.step == 2
    work.steps(2).save(tmp_path)  # The same step is saved again, over the remains.
    progress = work.load(tmp_path)
    assert progress is not None and progress.step == 4
    assert not later.exists()


def test_no_checkpoint_is_none(tmp_path):
    assert Work().load(tmp_path / "checkpoints") is None


def test_a_checkpoint_of_another_model_is_named_in_one_line(tmp_path):
    Work().steps(1).save(tmp_path)
    with pytest.raises(ValueError, match="step-00000001 does not fit this run's model") as raised:
        Work(width=6).load(tmp_path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_step_that_is_saved_again_is_never_away(tmp_path, monkeypatch):
    """Killed between the two renames."""
    work = Work().steps(2)
    work.save(tmp_path)
    work.steps(1).step = 2
    state = work.state()

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)  # the first thing that happens after the old one is renamed
    with pytest.raises(KeyboardInterrupt):
        work.save(tmp_path)
    monkeypatch.undo()
    assert Work(seed=1).load(tmp_path).step == 2  # the one that was to be replaced
    work.save(tmp_path)
    resumed = Work(seed=1)
    assert resumed.load(tmp_path).step == 2 and all(torch.equal(resumed.state()[key], state[key]) for key in state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]

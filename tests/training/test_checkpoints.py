"""Checkpoints are complete or absent, and bring everything back."""

import copy
import errno
import json
import math
import os
import shutil
from dataclasses import asdict

import pytest
import torch
from accelerate import Accelerator
from accelerate import accelerator as accelerator_module
from helpers.support import tiny_model
from helpers.tiny_run import equal, reset_accelerate
from safetensors import SafetensorError
from torch import nn

from loopitr import durable
from loopitr.durable import MANIFEST
from loopitr.objective.teachers import Frozen
from loopitr.training import checkpoints
from loopitr.training.checkpoints import STATE_FILE, Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from loopitr.training.optimization import warmup_cosine


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


class Work:
    """A model with dropout that learns noise: every step depends on weights, moments, rate and generators."""

    def __init__(self, seed=0, width=4):
        reset_accelerate()
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = warmup_cosine(optimizer, steps=20, warmup=5)
        self.step = 0

    def steps(self, count):
        for _ in range(count):
            loss = self.model(torch.randn(8, 3)).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.step += 1
        return self

    def save(self, folder, keep=2, **progress):
        return self.save_progress(folder, Progress(step=self.step, **progress), keep=keep)

    def save_progress(self, folder, progress, *, keep):
        return save_checkpoint(self.accelerator, folder, progress, keep=keep, scheduler=self.schedule)

    def load(self, folder):
        found = newest_checkpoint(folder)
        return found and load_checkpoint(self.accelerator, found.path, scheduler=self.schedule)

    def state(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


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


def damage(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.json"])
def test_a_damaged_newest_one_is_named_and_the_one_before_it_used(tmp_path, capsys, name, how):
    work = Work()
    work.steps(3).save(tmp_path)
    state = work.state()
    newest = work.steps(3).save(tmp_path)
    damage(newest / name, how)
    resumed = Work(seed=7)
    progress = resumed.load(tmp_path)
    assert progress is not None and progress.step == 3
    assert all(torch.equal(resumed.state()[key], state[key]) for key in state)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: the checkpoint {newest} is damaged ({name} ")
    assert line.endswith("it is now step-00000006.damaged, step-00000003 is used")
    work.steps(3).save(tmp_path, keep=1)  # What is set aside is no checkpoint.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006.damaged", "step-00000009"]


def test_checkpoints_that_are_all_damaged_are_not_taken_for_none(tmp_path):
    work = Work()
    for _ in range(2):
        (work.steps(1).save(tmp_path) / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="step-00000002: manifest.json cannot be read; step-00000001: manifest") as got:
        work.load(tmp_path)
    assert f"no checkpoint in {tmp_path} is whole" in str(got.value) and "\n" not in str(got.value)
    assert len(list(tmp_path.glob("step-*[0-9]"))) == 2


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torch_on_a_full_disk(*_, **__):
    """As torch's own writer has it: the file's error, and then one of its own when it closes the archive."""
    try:
        full_disk()
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


def safetensors_on_a_full_disk(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (checkpoints, "write_manifest", full_disk),
        (durable.os, "fsync", full_disk),
        (torch, "save", torch_on_a_full_disk),
        (accelerator_module, "save_accelerator_state", safetensors_on_a_full_disk),
    ],
    ids=["manifest", "fsync", "torch", "safetensors"],
)
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, where, name, error):
    work = Work()
    work.steps(3).save(tmp_path)
    expected = work.state()
    monkeypatch.setattr(where, name, error)
    with pytest.raises(OSError, match="No space left on device"):
        work.steps(2).save(tmp_path, keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert work.load(tmp_path).step == 3 and all(torch.equal(work.state()[key], expected[key]) for key in expected)
    work.steps(2).save(tmp_path, keep=1)


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


@pytest.mark.parametrize("step", ['"x"', "1e999", "true", "null"])
def test_a_step_that_is_no_number_is_a_damaged_checkpoint(tmp_path, step):
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / STATE_FILE).write_text(f'{{"step": {step}}}')
    with pytest.raises(ValueError, match="progress.json cannot be read .step is "):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_without_a_manifest_is_of_an_older_version(tmp_path):
    work = Work().steps(2)
    (work.save(tmp_path) / MANIFEST).unlink()
    assert work.load(tmp_path).step == 2

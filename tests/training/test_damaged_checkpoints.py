"""Damaged checkpoints are named and set aside, and a full disk keeps the one before."""

import errno
import os

import pytest
import torch
from accelerate import accelerator as accelerator_module
from helpers.checkpointed import Work
from helpers.tiny_run import reset_accelerate
from safetensors import SafetensorError

from loopitr import durable
from loopitr.durable import MANIFEST
from loopitr.training import checkpoints
from loopitr.training.checkpoints import STATE_FILE, newest_checkpoint


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()


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
    said: list[str] = []
    newest_checkpoint(tmp_path, log=said.append)
    assert len(said) == 1 and "has no manifest.json, so it cannot be verified" in said[0]

"""A run that is killed, at any moment, and resumed is the run that was not: its files are equal byte by byte.

Two kills here; recipes/benchmarks/soak.py makes as many as one likes.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers.forked_run import start, steps_logged
from helpers.waiting import wait, wait_until

from loopitr.evaluation import retrieval
from loopitr.training import checkpoints

pytestmark = pytest.mark.slow

# Dropout, augmentation, a window of log lines that no checkpoint ends, a validation in mid-epoch.
RUN = {
    "train__epochs": 2,
    "train__checkpoint_every": 3,
    "train__log_every": 2,
    "validation__every_steps": 5,
    "objective__mining": "sample",
    "objective__distillation_loss": "kl",
    "objective__teacher": "momentum",
    "data__scenes_train": 48,
    "data__scenes_val": 8,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    assert wait(start(folder, folder / "log", **RUN)) == 0, (folder / "log").read_text()[-3000:]
    return folder


def files(folder):
    run = folder / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("seconds", "pairs_per_second"):
        metrics.pop(name)
    metrics["training"].pop("seconds")
    kept = ("history.jsonl", "model.safetensors", "config.json")
    return {"metrics": metrics, **{name: (run / name).read_bytes() for name in kept}}


def resumed(folder):
    status = wait(start(folder, folder / "log", **RUN, resume=True))
    assert status == 0, (folder / "log").read_text()[-3000:]
    return files(folder)


def hang_in_the_second(module, name, at):
    """In the run's process: the second call of a function leaves a mark and never ends. `at` is called in it first."""

    def prepare():
        original, calls = getattr(module, name), []

        def hangs(*args, **kwargs):
            calls.append(1)
            if len(calls) < 2:
                return original(*args, **kwargs)
            at(*args, **kwargs)
            while True:
                time.sleep(1)

        setattr(module, name, hangs)

    return prepare


def half_a_manifest(folder):
    (folder / "manifest.json.partial").write_text("{")
    (folder.parent / "mark").touch()


@pytest.mark.parametrize("moment", ["while it saves", "while it evaluates"])
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(tmp_path, whole, moment):
    mark = tmp_path / "run" / "checkpoints" / "mark"
    if moment == "while it saves":
        prepare = hang_in_the_second(checkpoints, "write_manifest", half_a_manifest)
    else:
        prepare = hang_in_the_second(retrieval, "build_gallery", lambda *_, **__: mark.touch())
    pid = start(tmp_path, tmp_path / "log", prepare=prepare, **RUN)
    wait_until(mark.exists)
    mark.unlink()
    assert steps_logged(tmp_path) > 0
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    assert resumed(tmp_path) == files(whole)
    assert not Path(tmp_path / "run.1").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_says_how_to_go_on(tmp_path, whole, number):
    """SIGTERM as a batch system sends it: to the workers too."""
    pid = start(tmp_path, tmp_path / "log", prepare=os.setpgrp, **RUN, data__num_workers=1)
    wait_until(lambda: steps_logged(tmp_path) >= 4)
    os.killpg(pid, number)
    assert wait(pid) == 128 + number
    log = (tmp_path / "log").read_text()
    (saved,) = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))[-1:]
    step = int(saved.removeprefix("step-"))
    name = signal.Signals(number).name
    assert f"stopped by {name}: --resume continues from step {step}, saved in {tmp_path / 'run'}" in log
    assert "Traceback" not in log and "Error" not in log
    assert not (tmp_path / "run" / "run.lock").exists()
    assert resumed(tmp_path) == files(whole)


def test_a_run_stopped_in_its_last_validation_has_saved_its_last_step(tmp_path, whole):
    shutil.copytree(whole / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    mark = tmp_path / "mark"

    def prepare():
        original = retrieval.build_gallery

        def slow(*args, **kwargs):
            mark.touch()
            time.sleep(5)
            return original(*args, **kwargs)

        retrieval.build_gallery = slow

    pid = start(tmp_path, tmp_path / "log", prepare=prepare, **RUN, resume=True)
    wait_until(mark.exists)
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: --resume continues from step 12" in (tmp_path / "log").read_text()
    assert resumed(tmp_path) == files(whole)

"""Recipes that are told to stop, under the launchers that their users start them with."""

import os
import re
import signal
import subprocess
import time

import psutil
import pytest
from helpers.recipe_process import ACCELERATE, TWO_ON_CPU, command, environment, forked
from helpers.tiny_run import equal, logged, weights, without_curves, write_config

RUN = {"train__epochs": 4, "train__checkpoint_every": 0, "validation__every_epochs": 0}  # 32 steps of one process


def descendants(process):
    return psutil.Process(process.pid).children(recursive=True)


def wait_for_step(folder, process):
    end = time.monotonic() + 600
    while not logged(folder, "loss/total") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert logged(folder, "loss/total"), (folder / "output").read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "ranks"), [(ACCELERATE, 1), (TWO_ON_CPU, 2)], ids=["one process", "two"])
def test_sigterm_to_the_launcher_saves_the_run_and_what_is_resumed_equals_what_was_not_stopped(
    tmp_path, launcher, ranks
):
    """accelerate passes nothing on to a process that it started alone."""
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
        write_config(folder, **RUN, train__batch_size=8 // ranks)
    output = folders[1] / "output"
    with output.open("w") as file:
        words = command("pretrain.py", "--config", folders[1] / "tiny.yaml", launcher=launcher)
        parts = subprocess.Popen(words, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    wait_for_step(folders[1], parts)
    below = descendants(parts)
    os.kill(parts.pid, signal.SIGTERM)
    parts.wait(60)
    psutil.wait_procs(below, timeout=60)
    text = output.read_text()
    assert not any(process.is_running() for process in below), text[-3000:]
    (line,) = re.findall(r"stopped by SIGTERM: --resume continues from step (\d+), saved in", text)
    assert (folders[1] / "run" / "checkpoints" / f"step-{int(line):08d}").is_dir()
    assert "Traceback" not in text, text[-3000:]
    for folder, more in zip(folders, ([], ["--resume"])):
        with without_curves():
            done = forked("pretrain.py", "--config", folder / "tiny.yaml", *more, ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert equal(*(weights(folder) for folder in folders))
    assert logged(folders[0], "loss/total") == logged(folders[1], "loss/total")

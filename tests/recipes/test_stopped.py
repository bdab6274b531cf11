"""Recipes that are told to stop, under the launchers that their users start them with."""

import os
import re
import signal
import subprocess
import time

import psutil
import pytest
from helpers.recipe_process import ACCELERATE, TWO_ON_CPU, command, environment
from helpers.tiny_run import equal, logged, weights, write_config

RUN = {"train__epochs": 4, "train__checkpoint_every": 0, "validation__every_epochs": 0}  # 32 steps of one process


def launched(folder, launcher, **changes):
    words = command("pretrain.py", "--config", write_config(folder, **{**RUN, **changes}), launcher=launcher)
    with (folder / "output").open("a") as output:
        return words, subprocess.Popen(words, env=environment(), stdout=output, stderr=subprocess.STDOUT)


def descendants(process):
    return psutil.Process(process.pid).children(recursive=True)


def wait_for_step(folder, process, end):
    while not logged(folder, "loss/total") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert logged(folder, "loss/total"), (folder / "output").read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "size"), [(ACCELERATE, 8), (TWO_ON_CPU, 4)], ids=["one process", "two"])
def test_sigterm_to_the_launcher_saves_the_run_and_what_is_resumed_equals_what_was_not_stopped(
    tmp_path, launcher, size
):
    """accelerate passes nothing on to a process that it started alone."""
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    end = time.monotonic() + 600
    _, whole = launched(folders[0], launcher, train__batch_size=size)
    words, parts = launched(folders[1], launcher, train__batch_size=size)
    wait_for_step(folders[1], parts, end)
    below = descendants(parts)
    os.kill(parts.pid, signal.SIGTERM)
    parts.wait(60)
    psutil.wait_procs(below, timeout=60)
    output = (folders[1] / "output").read_text()
    assert not any(process.is_running() for process in below), output[-3000:]
    (line,) = re.findall(r"stopped by SIGTERM: --resume continues from step (\d+), saved in", output)
    assert (folders[1] / "run" / "checkpoints" / f"step-{int(line):08d}").is_dir()
    assert "Traceback" not in output, output[-3000:]
    done = subprocess.run([*words, "--resume"], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert whole.wait(600) == 0, (folders[0] / "output").read_text()[-3000:]
    assert equal(*(weights(folder) for folder in folders))
    assert logged(folders[0], "loss/total") == logged(folders[1], "loss/total")

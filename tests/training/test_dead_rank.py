"""A rank that dies takes the run with it: it ends with an error within a minute, and no process is left behind."""

import signal
import subprocess
import time

import psutil
import pytest
from helpers.recipe_process import TWO_ON_CPU, command, environment
from helpers.tiny_run import write_config

START, END = 240, 60  # seconds


def ranks_below(process):
    """The processes of the run by rank; the launcher and the loaders' workers are none."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            own = child.environ().get("RANK")
            if own is not None and child.parent().environ().get("RANK") is None:
                found[int(own)] = child
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_run_ends_with_its_rank(tmp_path, dying):
    config = write_config(tmp_path, train__epochs=100_000, validation__every_epochs=0)
    words = command("pretrain.py", "--config", config, launcher=TWO_ON_CPU)
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(words, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        try:
            history, deadline = tmp_path / "run" / "history.jsonl", time.monotonic() + START
            while not (history.is_file() and history.stat().st_size) and time.monotonic() < deadline:
                assert process.poll() is None, (tmp_path / "output").read_text()[-2000:]
                time.sleep(0.2)
            ranks = ranks_below(process)
            assert ranks.keys() == {0, 1}
            ranks[dying].send_signal(signal.SIGKILL)
            status = process.wait(END)
        finally:
            left = [*psutil.Process().children(recursive=True)] if process.poll() is None else []
            for child in left:
                if str(config) in " ".join(child.cmdline()):
                    child.kill()
            process.wait()
    text = (tmp_path / "output").read_text()
    assert status not in (0, None), text[-2000:]
    assert not ranks[1 - dying].is_running(), text[-2000:]
    assert (tmp_path / "run" / "config.yaml").is_file() and not (tmp_path / "run" / "metrics.json").exists()

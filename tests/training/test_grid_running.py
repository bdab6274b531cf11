"""The processes of a grid's runs: what they are given, why one failed, that two are not at one run."""

import signal
import sys

import pytest
from helpers.small_grids import finish, parse_run, plan, script

from loopitr.training.grid_running import attempts, failure


def test_a_run_is_given_its_options_and_logs(tmp_path):
    run = plan(tmp_path)[1]
    assert script(run, "import sys; print(*sys.argv[1:])") == 0
    assert f"--config={run.config}\n" in run.log.read_text() and "--resume" not in run.log.read_text()
    assert parse_run([f"--config={run.config}"]) == run.options
    script(run, "print('on')", resume=True)
    assert "--resume" in run.log.read_text() and attempts(run) == 2
    script(run, "print('anew')")
    assert attempts(run) == 1 and "on\n" not in run.log.read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise KeyError('word')", "KeyError: 'word'"),
        ("import sys; print('error: no data\\nlater', file=sys.stderr); sys.exit(2)", "no data"),
        ("print('step 1\\rstep 2', end=''); exit(3)", "step 2"),
        ("exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
    ],
)
def test_why_a_run_failed(tmp_path, text, reason):
    run = plan(tmp_path)[0]
    script(run, "print('error: an earlier attempt'); exit(2)")
    assert script(run, text, resume=True) not in (0, None)
    assert failure(run) == reason
    finish(run)
    assert failure(run) is None


@pytest.mark.slow
def test_a_run_that_was_interrupted_has_not_failed(tmp_path):
    run = plan(tmp_path)[0]

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            script(run, "import time; time.sleep(600)")  # would outlast the test
    finally:
        signal.signal(signal.SIGALRM, before)
    assert failure(run) is None and attempts(run) == 1
    assert script(run, "print('free')", resume=True) == 0  # the first process and its lock are gone


def test_two_processes_are_not_at_one_run(tmp_path):
    run = plan(tmp_path)[0]
    inner = f"""
import sys
sys.path[:0] = {sys.path!r}
from functools import partial
from pathlib import Path
from loopitr.cli import parse
from loopitr.training.grid import plan_runs, read_grid
from loopitr.training.grid_running import execute
from loopitr.training.options import PretrainOptions
runs = plan_runs(read_grid(Path({str(tmp_path / "grid.yaml")!r})), Path({str(tmp_path / "out")!r}),
                 partial(parse, PretrainOptions))
execute(runs[0], ["false"], resume=True)
"""
    assert script(run, inner) == 1
    assert failure(run) == f"ValueError: row 'base': another process uses {run.folder}; wait for it or end it"

"""Two runs do not write into one folder; the lock of a process that is gone is no lock."""

import json
import os
import socket
import subprocess
import sys
import threading

import psutil
import pytest
from helpers.forked_run import start
from helpers.recipe_process import error_lines
from helpers.tiny_run import logged, reset_accelerate, run, trainer
from helpers.waiting import wait

from loopitr.training import trainer as training
from loopitr.training.folder_lock import LOCK, FolderLock, _birth


def holder(process, **changes):
    return {"pid": process.pid, "host": socket.gethostname(), "started": process.create_time(), **changes}


@pytest.fixture
def other():
    """Another process, alive."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield psutil.Process(process.pid)
    process.communicate()


def test_a_lock_is_held_until_it_is_released(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(ValueError, match=f"another run is active in {tmp_path}: process {os.getpid()} on "):
        second.acquire()
    second.release()  # which it never had
    assert (tmp_path / LOCK).exists()
    first.release()
    assert not (tmp_path / LOCK).exists()
    second.acquire()
    second.release()


def test_a_living_process_is_refused(tmp_path, other):
    (tmp_path / LOCK).write_text(json.dumps(holder(other)))
    with pytest.raises(ValueError, match=f"process {other.pid} on .*; choose another train.output_dir") as raised:
        FolderLock(tmp_path).acquire()
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not say when a process started")
def test_a_clock_that_is_set_frees_no_lock(tmp_path, other):
    """A process's start as time of day moves with the clock, as where it is corrected soon after a boot."""
    birth = _birth(other.pid)
    (tmp_path / LOCK).write_text(json.dumps(holder(other, started=other.create_time() - 3600, birth=birth)))
    with pytest.raises(ValueError, match=f"process {other.pid} on "):
        FolderLock(tmp_path).acquire()
    (tmp_path / LOCK).write_text(json.dumps(holder(other, birth=f"{birth}1")))  # an earlier process with its pid
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["birth"] == _birth(os.getpid())
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_a_process_on_another_host_is_believed_to_run(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(holder(psutil.Process(), host="elsewhere")))
    with pytest.raises(ValueError, match=f"on elsewhere; if that one has ended, delete {tmp_path / LOCK}"):
        FolderLock(tmp_path).acquire()


@pytest.mark.parametrize(
    "state", ["gone", "another process with its pid", "half written", "empty", "this, earlier", "odd", "deep"]
)
def test_a_stale_lock_is_taken_over(tmp_path, other, state):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    content = {
        "gone": json.dumps({"pid": gone.pid, "host": socket.gethostname(), "started": 1.0}),
        "another process with its pid": json.dumps(holder(other, started=other.create_time() - 100)),
        "half written": '{"pid": 1',
        "empty": "",
        "deep": "[" * 100_000,
        "odd": '{"pid": 1e999, "host": "vm", "started": 0}',
        "this, earlier": json.dumps(holder(psutil.Process())),
    }[state]
    (tmp_path / LOCK).write_text(content)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "photo").write_text("photo")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "photo")
    with pytest.raises(OSError, match="run.lock is a link and no lock file"):
        FolderLock(tmp_path / "run").acquire()
    assert (tmp_path / "photo").read_text() == "photo"


def test_a_lock_that_is_no_file_is_not_waited_for(tmp_path):
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / LOCK)
        with pytest.raises(OSError, match="run.lock is a link and no lock file, or no file at all: delete it"):
            FolderLock(tmp_path).acquire()
        (tmp_path / LOCK).rename(tmp_path / f"{make.__name__} lock")


def test_of_many_that_start_together_one_gets_it(tmp_path):
    locks, got = [FolderLock(tmp_path) for _ in range(8)], []
    start = threading.Barrier(len(locks))

    def attempt(lock):
        start.wait()
        try:
            lock.acquire()
            got.append(lock)
        except ValueError:
            pass

    threads = [threading.Thread(target=attempt, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_the_second_run_in_a_folder_is_refused_and_the_first_goes_on(tmp_path, monkeypatch):
    """A second process, with and without --resume, while the first is between two steps."""
    logs = {False: tmp_path / "started", True: tmp_path / "resumed"}

    def step(self):
        for resume, log in logs.items():
            if not log.exists():
                assert wait(start(tmp_path, log, train__max_steps=2, resume=resume)) == 2
        original(self)

    original = training.Trainer._step
    monkeypatch.setattr(training.Trainer, "_step", step)
    run(tmp_path, train__max_steps=2)
    for log in logs.values():
        (line,) = error_lines(log.read_text())
        assert f"another run is active in {tmp_path / 'run'}: process {os.getpid()} " in line
    assert len(logged(tmp_path, "loss/total")) == 2 and not (tmp_path / "run.1").exists()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_run_that_fails_gives_its_lock_back(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("of a step")

    with trainer(tmp_path, train__max_steps=1) as made:
        monkeypatch.setattr(training.Trainer, "_step", fail)
        with pytest.raises(RuntimeError, match="of a step"):
            made.run()
    monkeypatch.undo()
    assert not (tmp_path / "run" / LOCK).exists()
    reset_accelerate()
    run(tmp_path, train__max_steps=1)
    assert (tmp_path / "run.1").is_dir() and not (tmp_path / "run.1" / LOCK).exists()

"""When accelerate has started one process of the several it was asked for. (That they are then started: recipes/.)"""

import os
import select
import signal
import sys
from types import SimpleNamespace

import psutil
import pytest

from loopitr.training.launching import asked_port, missing_processes, start_all_processes, threads_by_default

ALONE = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
MODULE = ["python", "-m", "accelerate.commands.launch"]


@pytest.mark.parametrize(
    "parent",
    [
        ["/venv/bin/python", "/venv/bin/accelerate", "launch", "--cpu", "--num_processes", "3", "recipes/pretrain.py"],
        ["/venv/bin/python", "/venv/bin/accelerate-launch", "--num_processes=3", "--cpu", "recipes/pretrain.py"],
        [*MODULE, "--cpu", "--num-processes=3", "recipes/pretrain.py", "--train.lr", "1e-4", "--num_processes", "9"],
        [*MODULE, "--num_machines", "1", "--num_processes", "3", "--cpu", "launch.py"],
    ],
)
def test_the_count_is_that_of_the_launcher(parent):
    assert missing_processes(ALONE, parent) == 3


@pytest.mark.parametrize("rank", [{"WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_processes_that_were_started_are_not_started_again(rank):
    assert missing_processes({**ALONE, **rank}, [*MODULE, "--cpu", "--num_processes", "2", "pretrain.py"]) == 1


@pytest.mark.parametrize(
    ("environment", "parent"),
    [
        ({}, ["bash"]),
        (ALONE, ["bash"]),  # Someone set this shell up by hand.
        ({**ALONE, "ACCELERATE_USE_CPU": "False"}, [*MODULE, "--num_processes", "2", "pretrain.py"]),
        ({"ACCELERATE_USE_CPU": "True"}, [*MODULE, "--cpu", "--num_processes", "1", "pretrain.py"]),
        (ALONE, [*MODULE, "--cpu", "--num_machines", "2", "--num_processes", "4", "pretrain.py"]),
        (ALONE, [*MODULE, "--cpu", "pretrain.py"]),
    ],
)
def test_one_process_is_left_alone(environment, parent):
    assert missing_processes(environment, parent) == 1


@pytest.mark.parametrize(
    ("words", "port"),
    [([], 0), (["--main_process_port", "0"], 0), (["--main_process_port=41234"], 41234)],
)
def test_only_a_port_that_was_asked_for_is_taken(words, port):
    assert asked_port([*MODULE, "--cpu", "--num_processes", "2", *words, "pretrain.py"]) == port
    assert asked_port(["bash", "--main_process_port", "41234"]) == 0


def test_two_launches_meet_at_different_ports(monkeypatch):
    """accelerate gives both of them its own default."""
    started = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    monkeypatch.setattr(os, "environ", {**os.environ, **ALONE})
    words = [*MODULE, "--cpu", "--num_processes", "2", "x.py"]
    parent = SimpleNamespace(cmdline=lambda: words, environ=lambda: {"OMP_NUM_THREADS": "1"})
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    assert start_all_processes() and start_all_processes()
    ports = [word for given in started for word in given if word.startswith("--master-port=")]
    assert len(set(ports)) == 2 and "--master-port=29500" not in ports


LAUNCHED = [*MODULE, "recipes/pretrain.py"]


def test_one_thread_that_nobody_asked_for():
    assert threads_by_default({"OMP_NUM_THREADS": "1"}, LAUNCHED, {})
    assert threads_by_default({**ALONE, "OMP_NUM_THREADS": "1"}, [*MODULE, "--cpu", "--num_processes", "2", "x.py"], {})


@pytest.mark.parametrize(
    ("environment", "parent", "parent_environment"),
    [
        ({}, LAUNCHED, {}),
        ({"OMP_NUM_THREADS": "4"}, LAUNCHED, {}),
        ({"OMP_NUM_THREADS": "1"}, LAUNCHED, {"OMP_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "1"}, [*MODULE, "--num_cpu_threads_per_process", "1", "x.py"], {}),
        ({"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}, LAUNCHED, {}),
        ({"OMP_NUM_THREADS": "1"}, ["bash"], {}),
    ],
)
def test_threads_that_someone_chose_stay(environment, parent, parent_environment):
    assert not threads_by_default(environment, parent, parent_environment)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the end of a parent")
def test_a_rank_ends_with_its_launcher():
    """Otherwise it would wait for hours to meet the others, or train on without anyone to stop it."""
    reader, writer = os.pipe()
    launcher = os.fork()
    if not launcher:
        if not os.fork():
            signal.alarm(60)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.update({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"})
            start_all_processes()
            os.write(writer, b"started")
        while True:
            signal.pause()
    os.close(writer)
    assert os.read(reader, 7) == b"started"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert select.select([reader], [], [], 30)[0] and os.read(reader, 1) == b""
    os.close(reader)

"""One thread for every test: on a busy machine, threads that wait for each other make tiny models 70 times slower."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Subprocesses get it too.

import pytest
import torch
from helpers.pretend_gpu import PretendGPU

torch.set_num_threads(1)
# A process's first backward pass starts autograd's threads if torch knows a device besides the CPU; processes that it
# forks can then have no backward pass. An ONNX export registers a device, so the first pass comes before all tests.
torch.ones((), requires_grad=True).backward()


@pytest.fixture
def gpu(monkeypatch) -> Iterator[PretendGPU]:
    """What is on `cuda` within a test, whether there is a GPU or not, lies on the CPU."""
    gib = 2**30
    for name, value in {
        "synchronize": None,
        "mem_get_info": (80 * gib, 80 * gib),
        "memory_allocated": gib,
        "max_memory_allocated": 2 * gib,
        "set_rng_state": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: x)  # It holds in threads too.
    with PretendGPU() as mode:
        yield mode


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process of pytest-xdist ends with a long one while others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)

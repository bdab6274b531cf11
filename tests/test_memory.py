"""What a fragmented heap holds goes back to the system."""

import platform

import psutil
import pytest
import torch

from loopitr import memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_fragments_are_given_back():
    def resident() -> int:
        return psutil.Process().memory_info().rss

    size = 96 * 2**10  # This is below the size that glibc maps, and gives back, by itself.
    memory.trim_memory()
    before = resident()
    blocks = [torch.ones(size // 4) for _ in range(2000)]  # 188 MiB
    kept = blocks[::20]
    del blocks
    fragmented = resident()
    assert memory.trim_memory()
    assert fragmented - before > 100 * 2**20  # The memory is free and still held.
    assert resident() - before < 60 * 2**20 and all(block[0] == 1 for block in kept)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    assert memory.trim_memory() is False

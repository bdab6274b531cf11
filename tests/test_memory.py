"""What a fragmented heap holds goes back to the system."""

import platform
import subprocess
import sys

import psutil
import pytest
import torch
from helpers.recipe_process import environment

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


# Prints the number of page faults while blocks of 64 MiB come and go. A forked process would have this one's settings.
PAGE_FAULTS = """
import resource, sys
from loopitr import memory
if sys.argv[1] == "True":
    assert memory.keep_memory() and memory.keep_memory()
size = 2**26
block = b"x" * size
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = b"x" * size
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_large_blocks_are_kept_for_the_next_ones():
    counts = {}
    for keep in (False, True):
        done = subprocess.run([sys.executable, "-c", PAGE_FAULTS, str(keep)], env=environment(), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        counts[keep] = int(done.stdout)
    assert counts[True] < counts[False] / 2


def test_no_block_is_kept_by_another_c_library(monkeypatch):
    memory.keep_memory.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert not memory.keep_memory()
    memory.keep_memory.cache_clear()

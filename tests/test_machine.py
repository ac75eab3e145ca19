"""What a process takes from its machine: memory that tensors free is kept, not fetched anew in each step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Page faults while 64 MB are taken and given back fifty times: 16,000 pages each time, if they are not kept.
FAULTS = """
import resource, sys
if sys.argv[1] == "kept":
    from cnn_tuning.machine import prepare_process
    prepare_process()
import torch
def take():
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
for _ in range(10):  # until the heap has found its size
    take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is settled")
def test_memory_that_tensors_free_is_kept():
    assert faults("kept") < faults("given back") / 20

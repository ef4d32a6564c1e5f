"""Memory that a training step frees stays with the process for the next step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource
import torch
from refold.training.memory import keep_freed_memory

def step():
    tensors = [torch.ones(12, 2**20) for _ in range(4)]  # 48 MiB each: above glibc's largest threshold

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
outside = faults()
with keep_freed_memory():
    step()
    inside = faults()
print(outside, inside)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_pages_are_not_cleared_again_inside() -> None:
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    outside, inside = map(int, result.stdout.split())
    assert outside > 1000
    assert inside < outside / 10

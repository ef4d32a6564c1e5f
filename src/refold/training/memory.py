"""Keep the memory that a training step frees for the next step."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt, from malloc.h, and the largest values its own adjustment reaches.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_TRIM, _LARGEST_MMAP = 64 << 20, 32 << 20


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """On the CPU under glibc, stop the allocator from handing freed activations back to the system each step.

    Otherwise the system clears the same pages again for every step: 2 to 4 % of a ViT-S step on two cores, and in an
    unlucky heap several times that. Peak memory stays what a step needs. After the block the thresholds are those
    that glibc's own adjustment reaches once large tensors have been freed. On other systems and C libraries the
    block changes nothing.
    """
    library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, 2**31 - 1)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)
        library.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM)

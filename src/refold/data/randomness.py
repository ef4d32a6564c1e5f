"""Random numbers that depend on (seed, epoch, sample) alone, and leave the global generators as they were."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from refold.errors import DataError

__all__ = ["generator", "preserved", "reseed"]


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator of its own for each (seed, epoch, purpose).

    Raises:
        DataError: a negative seed or epoch.
    """
    if seed < 0 or epoch < 0:
        raise DataError(f"seed {seed} and epoch {epoch} must be 0 or more")
    words = np.random.SeedSequence((seed, epoch, zlib.crc32(purpose.encode()))).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


@contextmanager
def preserved() -> Iterator[None]:
    """Restore the global generators (Python, NumPy, torch on the CPU) on leaving; not for use in threads."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def reseed(seed: int) -> None:
    """Seed the global CPU generators, which timm's and torchvision's transforms draw from.

    Args:
        seed: 0 to 2**32 - 1.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the accelerator too

"""What every test shares: one seed, one thread a worker, no network."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from commands import workplace as workplace
from photos import photos as photos

# The same examples on every machine, and no time limit for one: a busy machine is not a bug.
settings.register_profile("refold", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("refold")


def pytest_configure(config: pytest.Config) -> None:
    # The models are tiny: on a busy machine, threads that wait for each other made one forward 1000 times slower.
    torch.set_num_threads(1)
    # A test that needs a hub is a mistake; this turns it into an error at once instead of a slow time-out.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

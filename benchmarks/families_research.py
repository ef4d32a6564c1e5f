"""The research backbones that the tests keep (``tests/research``)."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path

import torch

from families_check import Family

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
MODELS = importlib.import_module("research").MODELS

__all__ = ["families"]


def _inputs(batch: int) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64),)


def families() -> list[Family]:
    return [Family("research", name, build, partial(_inputs), "small, own code") for name, build in MODELS.items()]

"""Backbones from research, small: written from the papers' ideas, each with the traits that make it awkward to adapt.

Their blocks and layers carry names of their own, and nothing of refold knows them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from research.ghostnet import GhostNet
from research.hatnet import HATNet
from research.hornet import HorNet
from research.internimage import InternImage
from research.revcol import RevCol
from research.twopath import TwoPath

__all__ = ["MODELS"]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "GhostNet": GhostNet,
    "HATNet": HATNet,
    "HorNet": HorNet,
    "InternImage": InternImage,
    "RevCol": RevCol,
    "TwoPath": TwoPath,
}

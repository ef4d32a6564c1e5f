"""Adapters, one file per mathematical form. They know channels and weights, never layer types."""

from refold.adapters.affine import ScaleShift
from refold.adapters.base import Adapter, Call, ChannelAdapter, WeightAdapter
from refold.adapters.bottleneck import LinearBottleneck
from refold.adapters.decomposed import Decomposed
from refold.adapters.lowrank import LowRank
from refold.adapters.orthogonal import BlockRotation
from refold.adapters.rows import RowBlocks
from refold.adapters.side import Layout, SideAdapter, TokenAdapter

__all__ = [
    "Adapter",
    "BlockRotation",
    "Call",
    "ChannelAdapter",
    "Decomposed",
    "Layout",
    "LinearBottleneck",
    "LowRank",
    "RowBlocks",
    "ScaleShift",
    "SideAdapter",
    "TokenAdapter",
    "WeightAdapter",
]

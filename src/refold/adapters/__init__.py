"""Adapters, one file per mathematical form. They know channels and weights, never layer types."""

from refold.adapters.base import Adapter, ChannelAdapter, WeightAdapter
from refold.adapters.bottleneck import LinearBottleneck
from refold.adapters.lowrank import LowRank

__all__ = ["Adapter", "ChannelAdapter", "LinearBottleneck", "LowRank", "WeightAdapter"]

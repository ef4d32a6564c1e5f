"""LoRA's map of a weight: ``W + scale * Up Down``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.base import Call, WeightAdapter, autocast_input
from refold.adapters.pointwise import mix

__all__ = ["LowRank"]


class LowRank(WeightAdapter):
    """A low-rank addition to a weight of shape (out, in, *kernel).

    ``down`` is (rank, in, *kernel), Kaiming-uniform with a = sqrt(5); ``up`` is (out, rank), zero. For a
    convolution ``down`` keeps the layer's kernel and geometry and ``up`` is pointwise.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        rank: int,
        scale: float,
        dropout: float,
        *,
        channel_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout, self.channel_dim = rank, scale, dropout, channel_dim
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, *weight_shape[1:], **factory))
        self.up = nn.Parameter(torch.zeros(weight_shape[0], rank, **factory))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def delta(self, weight: Tensor) -> Tensor:
        """``scale * Up Down`` in the shape and dtype of ``weight``."""
        up, down = self.up.to(weight), self.down.to(weight)
        return ((self.scale * up) @ down.flatten(1)).view(weight.shape)

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(weight), bias

    def branch(self, call: Call) -> Tensor:
        return self.expand(self.reduce(call), self.up)

    def reduce(self, call: Call) -> Tensor:
        """``Down x`` by the layer's own geometry."""
        x = F.dropout(autocast_input(call.x), self.dropout, self.training)
        return call.run(x, self.down.to(x.dtype))

    def expand(self, hidden: Tensor, up: Tensor) -> Tensor:
        """``scale * up`` times the hidden channels."""
        return mix(hidden, (self.scale * up).to(hidden.dtype), self.channel_dim)

    def extra_repr(self) -> str:
        return f"{tuple(self.down.shape)} -> {self.up.shape[0]}, scale={self.scale}, dropout={self.dropout}"

"""SSF's map: a scale and a shift per channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refold.adapters.base import ChannelAdapter
from refold.maps import ChannelMap, to_float64

__all__ = ["ScaleShift"]


class ScaleShift(ChannelAdapter):
    """``gamma * x + beta`` per channel; gamma starts at N(1, 0.02), beta at N(0, 0.02), as published.

    Args:
        width: channels d.
        channel_dim: position of the channels in the activation, from the end.
        shift: False leaves out beta, for hosts that have no place for it.
    """

    def __init__(
        self,
        width: int,
        *,
        channel_dim: int,
        shift: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.channel_dim = width, channel_dim
        factory = {"device": device, "dtype": dtype}
        self.gamma = nn.Parameter(torch.empty(width, **factory))
        self.beta = nn.Parameter(torch.empty(width, **factory)) if shift else None
        nn.init.normal_(self.gamma, mean=1.0, std=0.02)
        if self.beta is not None:
            nn.init.normal_(self.beta, std=0.02)

    def forward(self, x: Tensor, *, with_shift: bool = True) -> Tensor:
        shape = (-1, *[1] * (-self.channel_dim - 1))
        scaled = x * self.gamma.to(x.dtype).view(shape)
        return scaled + self.beta.to(x.dtype).view(shape) if with_shift and self.beta is not None else scaled

    def shift(self) -> Tensor | None:
        return self.beta

    def channel_map(self, cast: Callable[[Tensor], Tensor] = to_float64) -> ChannelMap:
        shift = None if self.beta is None else cast(self.beta)
        return ChannelMap(scale=cast(self.gamma), shift=shift, groups=self.width)

    def extra_repr(self) -> str:
        return f"{self.width}, shift={self.beta is not None}"

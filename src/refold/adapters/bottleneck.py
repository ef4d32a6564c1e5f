"""RepAdapter's map: identity plus a scaled linear bottleneck, dense down and grouped up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.base import ChannelAdapter, autocast_input
from refold.maps import ChannelMap, to_float64

__all__ = ["LinearBottleneck"]


class LinearBottleneck(ChannelAdapter):
    """``x + scale * (Up drop(Down x + a) + b)`` with Up block-diagonal over ``groups``.

    No activation, so it is the channel map ``M = I + scale Up Down``, ``c = scale (Up a + b)``.
    ``down`` is Xavier-uniform, everything else zero: the identity at the start.

    Args:
        width: channels d; must be divisible by ``groups``.
        rank: hidden width r; must be divisible by ``groups``.
        shift: False leaves out both biases, for hosts that have no place for c.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        groups: int,
        scale: float,
        dropout: float,
        *,
        channel_dim: int,
        shift: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.rank, self.groups = width, rank, groups
        self.scale, self.dropout, self.channel_dim = scale, dropout, channel_dim
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, width, **factory))
        self.up = nn.Parameter(torch.zeros(width, rank // groups, **factory))
        self.down_bias = nn.Parameter(torch.zeros(rank, **factory)) if shift else None
        self.up_bias = nn.Parameter(torch.zeros(width, **factory)) if shift else None
        nn.init.xavier_uniform_(self.down)

    def _dense_up(self) -> Tensor:
        """Up as (d, r): a product with a few explicit zeros is faster than ``groups`` small ones."""
        if self.groups == 1:
            return self.up
        return torch.block_diag(*self.up.chunk(self.groups))

    def forward(self, x: Tensor, *, with_shift: bool = True) -> Tensor:
        x = autocast_input(x)
        dtype = x.dtype
        down, up = self.down.to(dtype), (self.scale * self._dense_up()).to(dtype)
        biased = with_shift and self.down_bias is not None and self.up_bias is not None
        down_bias = self.down_bias.to(dtype) if biased and self.down_bias is not None else None
        up_bias = (self.scale * self.up_bias).to(dtype) if biased and self.up_bias is not None else None
        if self.channel_dim == -1:
            return self._channels_last(x, down, down_bias, up, up_bias)
        return self._channels_first(x, down, down_bias, up, up_bias)

    def _channels_last(
        self, x: Tensor, down: Tensor, down_bias: Tensor | None, up: Tensor, up_bias: Tensor | None
    ) -> Tensor:
        rows = x.reshape(-1, self.width)
        hidden = F.dropout(F.linear(rows, down, down_bias), self.dropout, self.training)
        if up_bias is not None:
            # A column of ones carries the bias through the one product that also adds the residual: one pass
            # over the activation instead of three.
            hidden = torch.cat((hidden, hidden.new_ones(hidden.shape[0], 1)), dim=1)
            up = torch.cat((up, up_bias[:, None]), dim=1)
        return torch.addmm(rows, hidden, up.t()).view(x.shape)

    def _channels_first(
        self, x: Tensor, down: Tensor, down_bias: Tensor | None, up: Tensor, up_bias: Tensor | None
    ) -> Tensor:
        maps = x.flatten(self.channel_dim + 1)
        batched = maps.reshape(-1, self.width, maps.shape[-1])
        hidden = down @ batched
        if down_bias is not None:
            hidden = hidden + down_bias[:, None]
        hidden = F.dropout(hidden, self.dropout, self.training)
        delta = up @ hidden
        if up_bias is not None:
            delta = delta + up_bias[:, None]
        return (batched + delta).view(x.shape)

    def shift(self) -> Tensor | None:
        if self.down_bias is None or self.up_bias is None:
            return None
        return self.scale * (self._dense_up() @ self.down_bias + self.up_bias)

    def channel_map(self, cast: Callable[[Tensor], Tensor] = to_float64) -> ChannelMap:
        up = self.scale * cast(self._dense_up())
        shift = None
        if self.down_bias is not None and self.up_bias is not None:
            shift = up @ cast(self.down_bias) + self.scale * cast(self.up_bias)
        return ChannelMap(
            scale=torch.ones(self.width, dtype=up.dtype, device=up.device), up=up, down=cast(self.down), shift=shift
        )

    def extra_repr(self) -> str:
        return f"{self.width}, rank={self.rank}, groups={self.groups}, scale={self.scale}, dropout={self.dropout}"

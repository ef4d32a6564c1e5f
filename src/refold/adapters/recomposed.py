"""ARC's map: identity plus a symmetric bottleneck whose projection all layers share, re-scaled by each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.base import ChannelAdapter, autocast_input
from refold.adapters.pointwise import along, mix
from refold.maps import ChannelMap, to_float64

__all__ = ["Projection", "Recomposed"]


class Projection(nn.Module):
    """D as ``matrix`` (r, d), down by it and up by its transpose; Xavier-uniform."""

    def __init__(
        self, width: int, rank: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(rank, width, device=device, dtype=dtype))
        nn.init.xavier_uniform_(self.matrix)


class Recomposed(ChannelAdapter):
    """``x + D^T (coefficients * D x) + b``; coefficients (r,) and b (d,) are the layer's own, zero at the start.

    ``shared`` holds D: a child of one adapter of each group, which the others refer to, see :meth:`projection`.

    Args:
        width: channels d.
        group: adapters of one group and width have D in common.
        dropout: on the re-scaled code, in training only.
        channel_dim: position of the channels in the activation, from the end.
        shift: False leaves out b, for hosts that have no place for it.
    """

    shared: Projection

    def __init__(
        self,
        width: int,
        rank: int,
        dropout: float,
        *,
        group: str,
        channel_dim: int,
        shift: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.group, self.dropout, self.channel_dim = width, (group, width), dropout, channel_dim
        self.coefficients = nn.Parameter(torch.zeros(rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype)) if shift else None

    @staticmethod
    def projection(adapters: Sequence[Recomposed]) -> Projection:
        """A fresh D for adapters of one group."""
        first = adapters[0]
        own = first.coefficients
        return Projection(first.width, len(own), device=own.device, dtype=own.dtype)

    def forward(self, x: Tensor, *, with_shift: bool = True) -> Tensor:
        x, dim = autocast_input(x), self.channel_dim
        matrix = self.shared.matrix.to(x)
        code = mix(x, self.coefficients.to(x)[:, None] * matrix, dim)
        moved = x + mix(F.dropout(code, self.dropout, self.training), matrix.t(), dim)
        return moved + along(self.bias.to(x), dim) if with_shift and self.bias is not None else moved

    def shift(self) -> Tensor | None:
        return self.bias

    def channel_map(self, cast: Callable[[Tensor], Tensor] = to_float64) -> ChannelMap:
        matrix, coefficients = cast(self.shared.matrix), cast(self.coefficients)
        matrix = matrix.to(coefficients.device)
        return ChannelMap(
            scale=torch.ones(self.width, dtype=matrix.dtype, device=matrix.device),
            up=matrix.t() * coefficients,
            down=matrix,
            shift=None if self.bias is None else cast(self.bias),
        )

    def extra_repr(self) -> str:
        return f"{self.width}, rank={len(self.coefficients)}, dropout={self.dropout}"

"""RLRR's map: a weight plus itself with its rows and columns re-scaled."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from refold.adapters.base import Call, WeightAdapter, autocast_input, widened
from refold.adapters.pointwise import along
from refold.maps import to_dense

__all__ = ["Rescaled"]


class Rescaled(WeightAdapter):
    """``W + diag(rows) W diag(columns)``, ``b + c`` for a weight (out, in / groups, *kernel).

    ``rows`` (out,) starts uniform in +-sqrt(6), ``columns`` (in / groups,) in +-sqrt(6 / their number), as published:
    near the backbone, not at it. c (out,) is zero.

    Args:
        channel_dim: position of the channels in the layer's output, from the end.
        shift: False leaves out c, for hosts that have no place for it.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        *,
        channel_dim: int,
        shift: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        out, inside = weight_shape[:2]
        factory = {"device": device, "dtype": dtype}
        self.rows = nn.Parameter(torch.empty(out, **factory))
        self.columns = nn.Parameter(torch.empty(inside, **factory))
        self.bias = nn.Parameter(torch.zeros(out, **factory)) if shift else None
        nn.init.uniform_(self.rows, -math.sqrt(6), math.sqrt(6))
        nn.init.uniform_(self.columns, -math.sqrt(6 / inside), math.sqrt(6 / inside))

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = widened(weight, self)
        factors = torch.outer(self.rows.to(wide), self.columns.to(wide))
        moved = (wide + factors.view(*factors.shape, *[1] * (wide.dim() - 2)) * wide).to(weight.dtype)
        if self.bias is None:
            return moved, bias
        constant = self.bias.to(weight)
        return moved, constant if bias is None else bias + constant

    def branch(self, call: Call) -> Tensor:
        x, dim = autocast_input(call.x), self.channel_dim
        # One more product with the frozen weight; a changed weight would cost one, and another for its gradient.
        frozen = call.run(x * along(self.columns.to(x), dim), to_dense(call.weight).to(x))
        added = along(self.rows.to(x), dim) * frozen
        return added if self.bias is None else added + along(self.bias.to(x), dim)

    def extra_repr(self) -> str:
        return f"{len(self.rows)} x {len(self.columns)}"

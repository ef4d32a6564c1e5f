"""LoRand's bottleneck: each of its projections is a sum of products of three small matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.side import Layout, SideAdapter

__all__ = ["ProductBottleneck", "SumOfProducts"]


class SumOfProducts(nn.Module):
    """``W = sum_i Q_i K_i P_i`` and a bias: ``outer`` Q (branches, out, r), ``core`` K (branches, r, r) and ``inner``
    P (branches, r, in).

    As published it starts Kaiming-uniform, each product with the fan of the matrix as it is stored in (in, out)
    order: bounds 1 / sqrt(r) for P and K and 1 / sqrt(out) for Q; the bias uniform within 1 / sqrt(in).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        branches: int,
        rank: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shapes = {
            "outer": ((branches, outputs, rank), outputs),
            "core": ((branches, rank, rank), rank),
            "inner": ((branches, rank, inputs), rank),
            "bias": ((outputs,), inputs),
        }
        for name, (shape, fan) in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            nn.init.uniform_(parameter, -1 / math.sqrt(fan), 1 / math.sqrt(fan))
            self.register_parameter(name, parameter)

    outer: nn.Parameter
    core: nn.Parameter
    inner: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), never through the whole W."""
        codes = F.linear(x, self.inner.flatten(0, 1))
        outer = (self.outer @ self.core).transpose(0, 1).flatten(1)
        return F.linear(codes, outer, self.bias)


class ProductBottleneck(SideAdapter):
    """``Up GELU(Down x)`` along the channels, both projections a :class:`SumOfProducts` with a bias.

    Args:
        width: channels d.
        hidden: inner width h.
        branches: products in each sum.
        rank: inner width r of the products.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        branches: int,
        rank: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = SumOfProducts(width, hidden, branches, rank, device=device, dtype=dtype)
        self.up = SumOfProducts(hidden, width, branches, rank, device=device, dtype=dtype)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return layout.unlast(self.up(F.gelu(self.down(layout.last(x)))))

"""Mona's bottleneck: a scaled norm in front, and filters of three sizes over the positions inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.convbottleneck import spatially
from refold.adapters.side import Layout, SideAdapter

__all__ = ["KERNELS", "MultiScaleBottleneck"]

#: Sides of the depthwise filters.
KERNELS = (3, 5, 7)


class MultiScaleBottleneck(SideAdapter):
    """``Up drop(GELU(v)) + b`` with ``v = m + Mix m``, ``m = u + mean_k Filter_k u``, ``u = Down(g LN(x) + f x) + a``.

    g and f are a number for each channel, 1e-6 and 1 at the start; Filter_k is depthwise, k x k with zeros at the
    borders, Mix is 1 x 1, all with biases. As published Down and Up start as a normal of std 0.02 with zero biases, the
    filters and Mix as torch's layers do: noise, not nothing. Tokens before those of the grid pass the filters alone, as
    images of one pixel.

    Args:
        width: channels d.
        hidden: inner width h.
        dropout: before Up, in training only.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        dropout: float,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)
        self.norm_scale = nn.Parameter(torch.full((width,), 1e-6, device=device, dtype=dtype))
        self.stream_scale = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.down = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.filters = nn.ModuleList(
            nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden, device=device, dtype=dtype) for k in KERNELS
        )
        self.mix = nn.Conv2d(hidden, hidden, 1, device=device, dtype=dtype)
        self.up = nn.Linear(hidden, width, device=device, dtype=dtype)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        features = layout.last(x)
        normed = self.norm_scale * self.norm(features) + self.stream_scale * features
        hidden = F.gelu(spatially(self._filtered, self.down(normed), layout))
        return layout.unlast(self.up(F.dropout(hidden, self.dropout, self.training)))

    def _filtered(self, maps: Tensor) -> Tensor:
        mean = torch.stack([filtered(maps) for filtered in self.filters]).mean(0)
        maps = maps + mean
        return maps + self.mix(maps)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"

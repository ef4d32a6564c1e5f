"""HorNet (arXiv 2207.14284): gnConv, a recursive gated convolution.

Awkward: one projection whose output is split unequally and gated order by order, one depthwise convolution that serves
every order, norms over channels of channels-first features, and layer scales.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["HorNet"]


class RecursiveGate(nn.Module):
    def __init__(self, width: int, order: int = 3) -> None:
        super().__init__()
        self.widths = [width // 2**i for i in reversed(range(order))]
        self.expand = nn.Conv2d(width, self.widths[0] + sum(self.widths), 1)
        self.spread = nn.Conv2d(sum(self.widths), sum(self.widths), 7, padding=3, groups=sum(self.widths))
        self.climb = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.widths, self.widths[1:], strict=False))
        self.collect = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, rest = self.expand(x).split([self.widths[0], sum(self.widths)], dim=1)
        orders = (self.spread(rest) / 3).split(self.widths, dim=1)
        gate = gate * orders[0]
        for climb, order in zip(self.climb, orders[1:], strict=True):
            gate = climb(gate) * order
        return self.collect(gate)


class Stage(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gate = RecursiveGate(width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.strength = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate(self.before(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        y = self.narrow(nn.functional.gelu(self.widen(self.behind(x.permute(0, 2, 3, 1)))))
        return x + (self.strength * y).permute(0, 3, 1, 2)


class HorNet(nn.Module):
    def __init__(self, classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.first, self.second = Stage(width), Stage(2 * width)
        self.shrink = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.scores = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.shrink(self.first(self.patches(x))))
        return self.scores(x.mean((2, 3)))

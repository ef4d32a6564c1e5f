"""HAT-Net (arXiv 2106.03180): hierarchical attention, first inside small windows, then over their pooled summaries.

Awkward: one set of 1x1 projections makes q, k and v for windows, another for two poolings of the result, all of them
convolutions; the same norm is called twice in a forward; positions of windows are folded into the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["HATNet"]


class Hierarchical(nn.Module):
    def __init__(self, width: int, window: int, heads: int) -> None:
        super().__init__()
        self.window, self.heads = window, heads
        self.norm = nn.BatchNorm2d(width)
        self.near = nn.ModuleDict({n: nn.Conv2d(width, width, 1, bias=False) for n in ("q", "k", "v")})
        self.far_query = nn.Conv2d(width, width, 1)
        self.far_rest = nn.Conv2d(width, 2 * width, 1, groups=2)
        self.out = nn.Conv2d(width, width, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(1, (self.heads, -1)).flatten(3).transpose(2, 3) for t in (q, k, v))
        mixed = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return mixed.transpose(2, 3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, length = x.shape
        size, y = self.window, self.norm(x)
        windows = y.view(batch, width, height // size, size, length // size, size)
        windows = windows.permute(0, 2, 4, 1, 3, 5).reshape(-1, width, size, size)
        inner = self.attend(*(self.near[n](windows) for n in ("q", "k", "v"))).view(windows.shape) + windows
        grid = inner.view(batch, height // size, length // size, width, size, size).permute(0, 3, 1, 4, 2, 5)
        grid = self.norm(grid.reshape(x.shape))
        pooled = nn.functional.avg_pool2d(grid, size) + nn.functional.max_pool2d(grid, size)
        keys, values = self.far_rest(pooled).chunk(2, dim=1)
        outer = self.attend(self.far_query(grid), keys, values).view(x.shape)
        return x + self.out(grid + outer)


class Inverted(nn.Module):
    """The MLP as an inverted residual: pointwise, depthwise, pointwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 2 * width, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.SiLU(inplace=True),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.SiLU(inplace=True),
            nn.Conv2d(2 * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class HATNet(nn.Module):
    def __init__(self, classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 7, stride=4, padding=3)
        self.body = nn.Sequential(Hierarchical(width, 4, 2), Inverted(width), Hierarchical(width, 2, 4))
        self.scores = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(torch.flatten(nn.functional.adaptive_avg_pool2d(self.body(self.patches(x)), 1), 1))

"""GhostNet (arXiv 1911.11907): half of the channels computed, the other half made from them by cheap depthwise filters.

Awkward: the result is cut to an odd width, so some channels of the cheap convolution never reach the output; squeeze
and excitation multiplies features by a function of themselves; the shortcut is depthwise; every BatchNorm follows a
layer without bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["GhostNet"]


class Ghost(nn.Module):
    def __init__(self, inside: int, out: int, *, active: bool) -> None:
        super().__init__()
        made, self.out = (out + 1) // 2, out
        self.intrinsic = nn.Sequential(nn.Conv2d(inside, made, 1, bias=False), nn.BatchNorm2d(made))
        self.cheap = nn.Sequential(nn.Conv2d(made, made, 3, padding=1, groups=made, bias=False), nn.BatchNorm2d(made))
        self.act = nn.ReLU(inplace=True) if active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        made = self.act(self.intrinsic(x))
        return torch.cat([made, self.act(self.cheap(made))], dim=1)[:, : self.out]


class Excite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(nn.functional.leaky_relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * nn.functional.hardsigmoid(gate)


class Bottleneck(nn.Module):
    def __init__(self, inside: int, middle: int, out: int, stride: int) -> None:
        super().__init__()
        self.widen = Ghost(inside, middle, active=True)
        self.move = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False) if stride > 1 else nn.Identity()
        self.gate = Excite(middle)
        self.narrow = Ghost(middle, out, active=False)
        self.shortcut = nn.Sequential(
            nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False),
            nn.BatchNorm2d(inside),
            nn.Conv2d(inside, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.gate(self.move(self.widen(x)))) + self.shortcut(x)


class GhostNet(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(Bottleneck(8, 17, 12, 2), Bottleneck(12, 25, 15, 1), Bottleneck(15, 30, 16, 2))
        self.scores = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.body(self.patches(x)).mean((2, 3)))

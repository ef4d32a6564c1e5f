"""A bottleneck with a convolution over the positions inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.nonlinear import ACTIVATIONS
from refold.adapters.side import Layout, SideAdapter

__all__ = ["ConvBottleneck", "spatially"]


def spatially(op: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor:
    """``op``, from maps (B, h, H, W) to maps of the same size, on features of ``layout`` with their channels last.

    Each token before those of the grid passes alone, as an image of one pixel.
    """
    inner = replace(layout, channel_dim=-1)
    maps, prefix = inner.maps(x)
    if prefix is not None:
        pixels = op(prefix.flatten(0, 1)[..., None, None])
        prefix = pixels.flatten(1).unflatten(0, prefix.shape[:2])
    return inner.unmaps(op(maps), prefix)


class ConvBottleneck(SideAdapter):
    """``scale * (Up drop(act(Conv act(Down x + a) + c)) + b)``; Conv keeps height and width, its borders are zeros.

    Each token before those of the grid is convolved alone, as an image of one pixel: it sees the kernel's centre.
    Down is Xavier-uniform, Up and the biases zero.

    Args:
        width: channels d.
        hidden: inner width h.
        kernel: height and width of Conv, odd.
        depthwise: Conv has one filter a channel instead of mixing them.
        identity: Conv starts as the identity; else Xavier-uniform.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: str = "quick_gelu",
        *,
        kernel: int = 3,
        depthwise: bool = False,
        identity: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        groups = hidden if depthwise else 1
        self.down = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.conv = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=groups, device=device, dtype=dtype)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(hidden, width, device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        if identity:
            nn.init.dirac_(self.conv.weight, groups)
        else:
            nn.init.xavier_uniform_(self.conv.weight)
        for layer in (self.down, self.conv, self.up):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        hidden = self.activation(self.down(layout.last(x)))
        hidden = self.activation(spatially(self.conv, hidden, layout))
        return layout.unlast(self.scale * self.up(F.dropout(hidden, self.dropout, self.training)))

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dropout={self.dropout}"

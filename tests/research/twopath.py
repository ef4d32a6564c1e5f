"""A segmentation ViT with a local and a global path that stay apart and inform each other.

Awkward: the local path is convolutional and at full resolution, the global one has tokens; one projection is called at
two scales; the exchange multiplies a layer's weight directly (``F.linear``) without calling the layer; keys and values
come from the other path; the output is a dict of a tensor, a tuple and a nested dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TwoPath"]


class LocalPath(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.wide = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=4)
        self.norm = nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.norm(self.dense(x) + self.wide(x)))


class GlobalPath(nn.Module):
    """Tokens ask the local path: queries from tokens, keys and values from pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ask, self.answer = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width)
        self.gated, self.back = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        keys, values = self.answer(pixels).chunk(2, dim=-1)
        # The layer itself is never called: its weight is.
        queries = nn.functional.linear(self.norm(tokens), self.ask.weight)
        tokens = tokens + nn.functional.scaled_dot_product_attention(queries, keys, values)
        gate, value = self.gated(self.norm(tokens)).chunk(2, dim=-1)
        return tokens + self.back(nn.functional.silu(gate) * value)


class TwoPath(nn.Module):
    def __init__(self, classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, stride=2)
        self.local_path = nn.ModuleList(LocalPath(width) for _ in range(2))
        self.global_path = nn.ModuleList(GlobalPath(width) for _ in range(2))
        self.align = nn.Linear(width, width)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.scores = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        fine = self.patches(x)
        tokens = nn.functional.avg_pool2d(fine, 4).flatten(2).transpose(1, 2)
        for local, wide in zip(self.local_path, self.global_path, strict=True):
            fine = local(fine)
            pixels = self.align(fine.flatten(2).transpose(1, 2))
            tokens = wide(self.align(tokens), pixels)
        side = int(tokens.shape[1] ** 0.5)
        coarse = tokens.transpose(1, 2).unflatten(2, (side, side))
        joined = self.up(fine + nn.functional.interpolate(coarse, size=fine.shape[-2:]))
        levels = (fine, coarse)
        return {"mask": self.scores(joined), "levels": levels, "extra": {"tokens": torch.tanh(tokens)}}

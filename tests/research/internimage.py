"""InternImage (arXiv 2211.05778): deformable convolution with grouped, softmax-modulated, learnt sampling points.

Awkward: the operator is a custom autograd function (compiled code elsewhere, here pure torch), sampling places depend
on the features, offsets start at zero, features are channels last, and norms come after their blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["InternImage"]


def sample(values: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Values (B, G, C, H, W) at each pixel's 9 neighbours moved by offsets (B, G, 9, H, W, 2), weighted and summed."""
    batch, groups, width, height, length = values.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(length), indexing="ij")
    pixels = torch.stack([columns, rows], -1).to(values)
    near = torch.tensor([-1, 0, 1])
    kernel = torch.cartesian_prod(near, near).flip(-1).to(values)
    places = pixels + kernel[:, None, None] + offsets
    grid = (2 * places + 1) / torch.tensor([length, height]).to(values) - 1
    picked = nn.functional.grid_sample(
        values.flatten(0, 1), grid.flatten(0, 1).flatten(1, 2), padding_mode="zeros", align_corners=False
    )
    return (picked.view(batch, groups, width, 9, height, length) * weights[:, :, None]).sum(3)


class Operator(torch.autograd.Function):
    """``sample`` as compiled operators come: the forward leaves no graph, the backward is its own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(values, offsets, weights)
        return sample(values, offsets, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            return torch.autograd.grad(sample(*inputs), inputs, gradients)


class Deformable(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.neighbourhood = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.where = nn.Linear(width, groups * 9 * 2)
        self.how_much = nn.Linear(width, groups * 9)
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.where, self.how_much):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        batch, height, length, _ = x.shape
        seen = nn.functional.gelu(self.neighbourhood(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        offsets = self.where(seen).view(batch, height, length, self.groups, 9, 2).permute(0, 3, 4, 1, 2, 5)
        weights = self.how_much(seen).view(batch, height, length, self.groups, 9).softmax(-1).permute(0, 3, 4, 1, 2)
        values = self.enter(x).view(batch, height, length, self.groups, -1).permute(0, 3, 4, 1, 2)
        moved = Operator.apply(values, offsets, weights)
        return self.leave(moved.flatten(1, 2).permute(0, 2, 3, 1))


class InternImage(nn.Module):
    def __init__(self, classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.GELU(), nn.AvgPool2d(2))
        self.deformable = nn.ModuleList(Deformable(width, groups=4) for _ in range(2))
        self.widen = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.scores = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for i, mixer in enumerate(self.deformable):
            x = x + self.norms[2 * i](mixer(x))
            x = x + self.norms[2 * i + 1](self.narrow[i](nn.functional.gelu(self.widen[i](x))))
        return self.scores(x.mean((1, 2)))

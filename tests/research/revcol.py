"""RevCol (arXiv 2212.11696): reversible columns under an autograd function of their own.

Awkward: the columns run inside a custom ``autograd.Function`` without a graph, and run again in its backward, which
recomputes each column's input from its output. Whatever an adapter adds must be the same in both, and gradients reach
it only through that second run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RevCol"]

LEVELS = 3


class Level(nn.Module):
    """Fuses the level below (finer) and the level above of the previous column (coarser), then mixes channels."""

    def __init__(self, width: int, *, lowest: bool, highest: bool) -> None:
        super().__init__()
        self.down = nn.Identity() if lowest else nn.Conv2d(width // 2, width, 2, stride=2)
        self.up = None if highest else nn.Conv2d(2 * width, width, 1)
        self.spatial = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.mix = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, finer: Tensor, coarser: Tensor | None) -> Tensor:
        x = self.down(finer)
        if self.up is not None and coarser is not None:
            x = x + nn.functional.interpolate(self.up(coarser), size=x.shape[-2:])
        return x + self.mix(self.norm(self.spatial(x)))


class Column(nn.Module):
    """``y_l = F_l(y_{l-1}, x_{l+1}) + gain_l x_l``: reversible, because ``x_l`` enters by its gain alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Level(width * 2**i, lowest=i == 0, highest=i == LEVELS - 1) for i in range(LEVELS))
        self.gains = nn.ParameterList(torch.full((1, width * 2**i, 1, 1), 0.5) for i in range(LEVELS))

    def level(self, index: int, finer: Tensor, previous: list[Tensor]) -> Tensor:
        coarser = previous[index + 1] if index + 1 < LEVELS else None
        return self.levels[index](finer, coarser)

    def forward(self, stem: Tensor, *previous: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for i, gain in enumerate(self.gains):
            finer = found[-1] if found else stem
            found.append(self.level(i, finer, list(previous)) + gain * previous[i])
        return tuple(found)

    def reverse(self, stem: Tensor, found: tuple[Tensor, ...]) -> list[Tensor]:
        """The previous column's levels from this one's, the coarsest first."""
        previous: list[Any] = [None] * LEVELS
        for i in reversed(range(LEVELS)):
            previous[i] = (found[i] - self.level(i, found[i - 1] if i else stem, previous)) / self.gains[i]
        return previous


class Reversible(torch.autograd.Function):
    """Runs all columns keeping the last one's output only."""

    @staticmethod
    def forward(ctx: Any, columns: nn.ModuleList, stem: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        levels = start(stem)
        for column in columns:
            levels = column(stem, *levels)
        ctx.columns, ctx.parameters = columns, parameters
        ctx.save_for_backward(stem, *levels)
        return levels

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        stem, *found = ctx.saved_tensors
        sums: dict[int, Tensor] = {}
        into_stem = torch.zeros_like(stem)
        for column in reversed(ctx.columns):
            with torch.no_grad():
                previous = column.reverse(stem, tuple(found))
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in (stem, *previous)]
                wanted = [p for p in ctx.parameters if p.requires_grad]
                made = torch.autograd.grad(column(*inputs), [*inputs, *wanted], gradients, allow_unused=True)
            into_stem = into_stem + made[0]
            gradients = tuple(torch.zeros_like(p) if g is None else g for g, p in zip(made[1:], previous, strict=False))
            for parameter, gradient in zip(wanted, made[len(inputs) :], strict=True):
                if gradient is not None:
                    sums[id(parameter)] = sums.get(id(parameter), 0) + gradient
            found = previous
        return None, into_stem, *(sums.get(id(p)) for p in ctx.parameters)


def start(stem: Tensor) -> tuple[Tensor, ...]:
    """The levels before the first column: constants, so that what reads them matters."""
    size = stem.shape[-1]
    return tuple(stem.new_ones(len(stem), stem.shape[1] * 2**i, size // 2**i, size // 2**i) for i in range(LEVELS))


class RevCol(nn.Module):
    def __init__(self, classes: int = 3, width: int = 8, *, reversible: bool = True) -> None:
        super().__init__()
        self.reversible = reversible
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.columns = nn.ModuleList(Column(width) for _ in range(2))
        self.scores = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.patches(x)
        if self.reversible:
            levels = Reversible.apply(self.columns, stem, *self.columns.parameters())
        else:
            levels = start(stem)
            for column in self.columns:
                levels = column(stem, *levels)
        return self.scores(levels[-1].mean((2, 3)))

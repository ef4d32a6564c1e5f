"""A side state that low-rank maps fill from block to block, and that later blocks get back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.ladder import Carrier
from refold.adapters.side import Layout

__all__ = ["SideState"]


class SideState(Carrier):
    """``h = h_before + B A x``; where it ``adds``, the block gets ``conv(h sigmoid(beta h))`` back.

    What is handed on are the codes A x of the blocks so far, r numbers a position each, and not h itself, of which
    a sum of products makes as much as needed: the state costs next to no memory. A Kaiming-uniform, B zero.

    Args:
        width: channels d.
        rank: r.
        beta: how hard the gate is.
        stage: the row it belongs to.
        adds: whether h is added to the block's output; without, nothing is, and that output's graph stays alone.

    Attributes:
        conv: over the positions of the gated h, prefix tokens left out; None without. Adapters may share it.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        beta: float,
        *,
        stage: str = "",
        adds: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.beta, self.stage, self.adds = width, beta, stage, adds
        self.down = nn.Linear(width, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, width, bias=False, device=device, dtype=dtype)
        self.conv: nn.Module | None = None
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, layout: Layout) -> Tensor | None:
        state = (*(self.taken() or ()), (self.down(layout.last(x)), self.up.weight))
        self.keep(state)
        if not self.adds:
            return None
        codes, maps = zip(*state, strict=True)
        h = F.linear(torch.cat(codes, -1), torch.cat(maps, 1))
        gated = layout.unlast(F.silu(self.beta * h) / self.beta)  # stores one tensor where h sigmoid(beta h) stores two
        if self.conv is None:
            return gated
        positions, prefix = layout.maps(gated)
        return layout.unmaps(self.conv(positions), prefix)

    def convolution(self) -> nn.Conv2d:
        """A fresh ``conv``: 3 x 3, depthwise, without a bias."""
        weight = self.down.weight
        return nn.Conv2d(
            self.width,
            self.width,
            3,
            padding=1,
            groups=self.width,
            bias=False,
            device=weight.device,
            dtype=weight.dtype,
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, stage={self.stage!r}, adds={self.adds}"

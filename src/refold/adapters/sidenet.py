"""A narrow network beside the backbone, in steps: one reads features, one joins and transforms, one gives back."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.ladder import Carrier
from refold.adapters.side import Layout

__all__ = ["Entry", "Exit", "Rung"]

#: What the gate's logit is divided by.
TEMPERATURE = 0.1
#: Channels of an attention head.
_HEAD = 8


class Entry(Carrier):
    """The first state of a stage: ``E x``, and ``C pool(s)`` where the stage before left s.

    Args:
        width: channels d of the backbone.
        side: channels of the state.
    """

    beside = True

    def __init__(
        self, width: int, side: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.side = side
        self.down = nn.Linear(width, side, device=device, dtype=dtype)
        self.carry: nn.Linear | None = None

    def carry_from(self, side: int) -> None:
        """Make room for the state of a stage before, of ``side`` channels."""
        weight = self.down.weight
        self.carry = nn.Linear(side, self.side, bias=False, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor, layout: Layout) -> None:
        state = self.down(layout.last(x))
        left = self.taken()
        if left is not None:
            assert self.carry is not None
            before, its_layout = left
            here, prefix = layout.maps(layout.unlast(state))
            there, _ = its_layout.maps(its_layout.unlast(before))
            pooled = F.adaptive_avg_pool2d(there, (here.shape[-2], here.shape[-1]))
            state = layout.last(layout.unmaps(here + self.carry(pooled.movedim(1, -1)).movedim(-1, 1), prefix))
        self.keep((state, layout))


class Rung(Carrier):
    """``s = T(g D y + (1 - g) s_before)``, ``g = sigmoid(alpha / 0.1)``, T a transformer block; adds nothing.

    T is a pre-norm block of the side's width: attention over all positions in heads of 8 channels, or as many as divide
    both, MLP of four times the width with GELU.

    Args:
        width: channels d of the backbone.
        side: channels of the state.
    """

    beside = True

    def __init__(
        self, width: int, side: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.side, self.heads = side, side // math.gcd(side, _HEAD)
        self.down = nn.Linear(width, side, device=device, dtype=dtype)
        self.alpha = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.norm1 = nn.LayerNorm(side, device=device, dtype=dtype)
        self.qkv = nn.Linear(side, 3 * side, device=device, dtype=dtype)
        self.proj = nn.Linear(side, side, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(side, device=device, dtype=dtype)
        self.fc1 = nn.Linear(side, 4 * side, device=device, dtype=dtype)
        self.fc2 = nn.Linear(4 * side, side, device=device, dtype=dtype)

    def forward(self, x: Tensor, layout: Layout) -> None:
        before, _ = self.taken()
        gate = torch.sigmoid(self.alpha / TEMPERATURE)
        joined = gate * self.down(layout.last(x)) + (1 - gate) * before
        state = joined.flatten(1, -2)
        state = state + self._attention(self.norm1(state))
        state = state + self.fc2(F.gelu(self.fc1(self.norm2(state))))
        self.keep((state.view(joined.shape), layout))

    def _attention(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Exit(Carrier):
    """``U norm(s) + b`` is added; U and b zero at the start.

    Args:
        width: channels d of the backbone.
        side: channels of the state.
    """

    beside = True

    def __init__(
        self, width: int, side: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(side, device=device, dtype=dtype)
        self.up = nn.Linear(side, width, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        state, _ = self.taken()
        return layout.unlast(self.up(self.norm(state)))

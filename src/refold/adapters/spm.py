"""A prompt that a soft map of classes guides, refined in a few equal steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.convbottleneck import spatially
from refold.adapters.side import Layout, SideAdapter

__all__ = ["SemanticMatcher"]


class SemanticMatcher(SideAdapter):
    """``U z_T + b`` with ``z_0 = D x + a``, ``z_t = z_{t-1} + GELU(F(z_{t-1} + E softmax(C z_{t-1} + c)) + f)``.

    F is depthwise 3 x 3, its borders zeros; the steps share all of their parameters. Each token before those of the
    grid passes F alone, as an image of one pixel. U and b are zero, the rest is as torch starts it.

    Args:
        width: channels d of the features.
        hidden: channels h of the prompt.
        classes: of the interim semantic map: C (classes, h), E (h, classes).
        steps: T.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        classes: int,
        steps: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.down = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.classify = nn.Linear(hidden, classes, device=device, dtype=dtype)
        self.embed = nn.Linear(classes, hidden, bias=False, device=device, dtype=dtype)
        self.filters = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, device=device, dtype=dtype)
        self.up = nn.Linear(hidden, width, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        prompt = self.down(layout.last(x))
        for _ in range(self.steps):
            guided = prompt + self.embed(self.classify(prompt).softmax(-1))
            prompt = prompt + F.gelu(spatially(self.filters, guided, layout))
        return layout.unlast(self.up(prompt))

    def extra_repr(self) -> str:
        return f"steps={self.steps}"

"""The bottleneck with an activation that most adapters are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.side import Layout, SideAdapter

__all__ = ["ACTIVATIONS", "Bottleneck"]


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``, CLIP's approximation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


#: By the name a method's ``activation`` takes.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


class Bottleneck(SideAdapter):
    """``scale * (Up drop(act(Down x + a)) + b)`` along the channels.

    Args:
        width: channels d.
        hidden: inner width h.
        init: start of both projections: ``"lora"`` (Down Kaiming-uniform with a = sqrt(5), Up zero), ``"xavier"``
            (both Xavier-uniform, biases of std 1e-6), or a number, the standard deviation of a truncated normal.
        channel_scale: a learned factor for each channel, ones at the start, in place of the number ``scale``.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: str = "gelu",
        *,
        init: str | float = "lora",
        channel_scale: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.down = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(hidden, width, device=device, dtype=dtype)
        self.gamma = nn.Parameter(torch.ones(width, device=device, dtype=dtype)) if channel_scale else None
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
            if init == "xavier":
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)
            elif init == "lora":
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            else:
                assert isinstance(init, float)
                nn.init.trunc_normal_(layer.weight, std=init)
        if init == "lora":
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        hidden = F.dropout(self.activation(self.down(layout.last(x))), self.dropout, self.training)
        added = self.up(hidden)
        added = self.scale * added if self.gamma is None else self.gamma.to(added.dtype) * added
        return layout.unlast(added)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dropout={self.dropout}"

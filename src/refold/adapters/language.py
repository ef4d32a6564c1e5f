"""Features that attend to words: a bottleneck whose positions read what text embeddings say."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.side import Layout, SideAdapter

__all__ = ["LanguageBottleneck", "Words"]


class Words(nn.Module):
    """Text embeddings (K, C), learned from where they start: random, of length 1 on average.

    Args:
        count: K.
        width: C.
    """

    def __init__(
        self, count: int, width: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(count, width, device=device, dtype=dtype) / math.sqrt(width))


class LanguageBottleneck(SideAdapter):
    """``U (v + softmax(v (K t)^T / sqrt(h)) V t) + b`` with ``v = GELU(D x + a)``, for each position alone.

    t are the embeddings of :class:`Words`, which several adapters share. U and b are zero, the rest is as torch starts
    it.

    Args:
        width: channels d of the features.
        hidden: channels h.
        text: channels C of the embeddings.
    """

    words: Words

    def __init__(
        self,
        width: int,
        hidden: int,
        text: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.key = nn.Linear(text, hidden, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(text, hidden, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(hidden, width, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        codes = F.gelu(self.down(layout.last(x)))
        keys, values = self.key(self.words.embeddings), self.value(self.words.embeddings)
        shares = (codes @ keys.t() / math.sqrt(keys.shape[-1])).softmax(-1)
        return layout.unlast(self.up(codes + shares @ values))

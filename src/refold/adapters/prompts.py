"""Learned tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.side import TokenAdapter

__all__ = ["Prompts"]


class Prompts(TokenAdapter):
    """Tokens that are the same for every image.

    Args:
        width: channels d.
        tokens: how many, p.
        bound: start, uniform in [-bound, bound].
        dropout: of single numbers, for each image on its own, in training only.
    """

    def __init__(
        self,
        width: int,
        tokens: int,
        bound: float,
        dropout: float = 0.0,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.prompts = nn.Parameter(torch.empty(tokens, width, device=device, dtype=dtype))
        nn.init.uniform_(self.prompts, -bound, bound)

    @property
    def count(self) -> int:
        return len(self.prompts)

    def tokens(self, batch: int) -> Tensor:
        return F.dropout(self.prompts.expand(batch, -1, -1), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"

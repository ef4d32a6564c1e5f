"""LoRA: "Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).

    W' = W + s B A,   A Kaiming-uniform (a = sqrt 5), B zero; s is the paper's alpha / r.

Default place: the attention's joint qkv projection, one A and one B, the variant of the VTAB literature (NOAH).
On a convolution A keeps the kernel and the geometry (stride, padding and its mode, dilation) and B is
pointwise. Bias unchanged. Layouts: channels last and channels first, and ``nn.MultiheadAttention``'s packed
projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import LowRank
from refold.errors import SiteError
from refold.fold import replaces_weight
from refold.methods.base import Method, Plan, are_sites, is_count, is_number, require
from refold.sites import Site, Survey

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank addition to a frozen weight; merges exactly.

    Args:
        rank: r.
        scale: s, what other libraries write as ``alpha / r``.
        dropout: on the input of A, in training only; not available where the weight itself is replaced
            (``nn.MultiheadAttention``, grouped convolutions), which is refused.
        sites: roles or module paths (``*`` allowed); None is the attention's projection where the backbone has
            one, else every Linear and every channel-mixing convolution.

    Raises:
        SiteError: a hyper-parameter is out of range.
    """

    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "low-rank addition to a frozen weight"
    paper: ClassVar[str] = "arXiv 2106.09685"

    def __post_init__(self) -> None:
        require(self, "rank", is_count(self.rank), "a positive integer")
        require(self, "scale", is_number(self.scale, -1e6, 1e6) and self.scale != 0, "a number other than 0")
        require(self, "dropout", is_number(self.dropout, 0.0, 0.999), "in [0, 1)")
        require(self, "sites", are_sites(self.sites), "None, a role or path, or a tuple of them")

    def plan(self, survey: Survey) -> Plan:
        layers, skipped = survey.resolve(self.sites, ("attention",), moved=False)
        for layer in layers:
            if self.dropout and replaces_weight(layer.module):
                raise SiteError(
                    f"dropout={self.dropout} has no place: the layer's weight is replaced, its input is out of reach",
                    where=layer.path,
                    remedy="Use dropout=0, or other sites",
                )
        return Plan(tuple(survey.weight_site(layer) for layer in layers), tuple(skipped))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> LowRank:
        return LowRank(
            site.weight_shape,
            self.rank,
            self.scale,
            self.dropout,
            channel_dim=site.channel_dim,
            device=device,
            dtype=dtype,
        )

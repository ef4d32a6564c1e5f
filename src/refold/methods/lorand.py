"""LoRand: "1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions" (CVPR 2023).

    y = z + U GELU(D z + a) + b,   D (d/2 x d) and U (d x d/2) each a sum of n products Q K P of inner rank 8

z is what the attention's, and what the MLP's, last projection gives. The three matrices of each product are its own.
All start Kaiming-uniform, so the start is noise beside the backbone, as published. On Swin-B, with two places in each
block: 1,203,456 parameters with branches=2 (the paper's LoRand), 2,370,816 with 4 (LoRand+), 4,705,536 with 8
(LoRand++): n (3 r d + 2 r^2) + d/2 + d a place. It does not fold: it has an activation.

Deviations from released codes, on purpose: the MLP's adapter sits behind the MLP, as in the paper and its authors'
later code, where others have it before. Channels are multiplied with P, then with Q K, which gives what the whole D and
U would give with less work. z is what the projection gives, before a block's layer scale. Layouts: channels last and
channels first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters.products import ProductBottleneck
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.insertion import behind_last
from refold.methods.weight import check_usual
from refold.sites import Site
from refold.survey import Survey

__all__ = ["LoRand"]


@dataclass(frozen=True)
class LoRand(Method):
    """Bottleneck of half the width whose projections are sums of low-rank products, behind the attention and the MLP.

    Args:
        rank: inner rank r of the products.
        branches: products n in each sum; the paper has 2, 4 (LoRand+) and 8 (LoRand++).
        sites: roles (``"attention"``, ``"mlp"``: behind the last projection of that residual branch), or paths of
            layers, behind each of them (``*`` allowed); None is both roles.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it for dense prediction on a wide backbone, where a bottleneck of half the width would be large: this one has
    the width without the parameters.
    """

    rank: int = 8
    branches: int = 2
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "wide bottleneck of low-rank products behind the attention and the MLP"
    paper: ClassVar[str] = "CVPR 2023"
    folds: ClassVar[str] = "no"
    tasks: ClassVar[str] = "detection, segmentation"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "branches", is_count(self.branches), "a positive integer")

    def plan(self, survey: Survey) -> Plan:
        sites, skipped = behind_last(survey, self.sites, ("attention", "mlp"), folds=False)
        return Plan(tuple(sites), tuple(skipped))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> ProductBottleneck:
        hidden = max(site.width // 2, 1)
        return ProductBottleneck(site.width, hidden, self.branches, self.rank, device=device, dtype=dtype)

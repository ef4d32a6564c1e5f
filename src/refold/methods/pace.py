"""PACE: "Marrying generalization in PArameter-efficient fine-tuning with Consistency rEgularization".

    W' = W + W * (B A),   b' = b + b * d + W p,   p = P q      (* entry by entry)

on every projection of a block: LoRA_mul + VPT_add, the adapter of arXiv 2409.17137. B (out, r), P (in, r) and d zero,
A (r, in) and q (r) Xavier-uniform: the identity at the start. Merged as written; a layer without a bias keeps the part
of W alone.

The paper's consistency loss between two noisy passes is a matter of training, not of the map. Layouts: channels last
and channels first, and ``nn.MultiheadAttention``'s packed projection; in a convolution B A has its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters.modulated import Modulated
from refold.methods.glora import fitting
from refold.methods.weight import WeightMethod
from refold.sites import Site

__all__ = ["PACE"]


@dataclass(frozen=True)
class PACE(WeightMethod):
    """Low-rank factor of a frozen weight and a prompt in its bias; merges exactly.

    Args:
        rank: r.
        sites: roles or module paths (``*`` allowed); None is every projection of attention and MLP where the
            backbone has these, else every Linear and every channel-mixing convolution.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it with few labelled images, and with its consistency loss, for which a step runs the model twice.
    """

    rank: int = 10
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "low-rank factor of a weight and a prompt in its bias"
    paper: ClassVar[str] = "arXiv 2409.17137"
    shifts: ClassVar[bool] = True

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Modulated:
        return Modulated(
            site.weight_shape,
            self.rank,
            fitting({"a": "lora", "c": "lora", "d": "vector"}, site),
            channel_dim=site.channel_dim,
            device=device,
            dtype=dtype,
        )

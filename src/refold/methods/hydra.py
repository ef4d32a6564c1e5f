"""Hydra: "Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning" (arXiv 2309.06922).

    f(x) = y + s (B_p drop(A_p x + a_p) + b_p) + s (B_s drop(A_s y + a_s) + b_s),   y = W x + b the frozen layer

a parallel branch on the layer's input and a sequential one on its output, each of rank r. A Xavier-uniform, the rest
zero: the identity at the start. Places: the attention's and the MLP's last projection. 239,712 parameters on ViT-B/16
(the printed 0.28M with a head of 49 classes, VTAB's mean). Merged:

    W' = W + s (B_p A_p + B_s A_s W),   b' = b + s (c_p + c_s + B_s A_s b),   c = B a + b of each branch

Deviations from the released code, on purpose: its merge of the attention reads the MLP's weight; and a layer without
a bias gets branches without theirs, which would have no place in it. Layouts: channels last and channels first, and
``nn.MultiheadAttention``'s output projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters.branches import Branches
from refold.methods.weight import WeightMethod
from refold.sites import Site

__all__ = ["Hydra"]


@dataclass(frozen=True)
class Hydra(WeightMethod):
    """Linear low-rank branches beside and behind a frozen projection; merges exactly.

    Args:
        rank: r of each branch.
        scale: s; the paper chooses it per task between 0.1 and 4.5.
        dropout: on the code of r numbers, in training only; none where the weight itself is replaced
            (``nn.MultiheadAttention``), which ``explain`` tells.
        sites: roles or module paths (``*`` allowed); None is the last projection of every attention and MLP where
            the backbone has these, else every Linear and every channel-mixing convolution.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it in place of :class:`LoRA` for the same number of parameters: its second branch starts from what the layer
    has learned to give.
    """

    rank: int = 2
    scale: float = 1.0
    dropout: float = 0.2
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "low-rank branches beside and behind a projection"
    paper: ClassVar[str] = "arXiv 2309.06922"
    tasks: ClassVar[str] = "classification, language"
    roles: ClassVar[tuple[str, ...]] = ("attention_out", "mlp_out")
    shifts: ClassVar[bool] = True
    ungrouped: ClassVar[str] = "the branch behind the layer mixes its outputs"

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Branches:
        return Branches(
            site.weight_shape,
            self.rank,
            self.scale,
            self.dropout,
            channel_dim=site.channel_dim,
            shift=site.has_shift,
            device=device,
            dtype=dtype,
        )

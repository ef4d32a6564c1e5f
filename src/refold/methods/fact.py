"""FacT: "Factor-Tuning for Lightweight Adaptation on Vision Transformer" (arXiv 2212.03145).

The weights of all blocks are one tensor of N slices d x d (N = 12 L: q, k, v, o, four of fc1, four of fc2 in each of
L blocks), and its change is factored:

    TT:  dW_i = s U S_i V^T
    TK:  dW_i = s U (sum_k P_ik C_k) V^T

U, V (d x r) and TK's core C (r x r x r) are one for all slices. The start is the backbone: V zero, U and S as a
Linear starts, C and P Xavier-uniform. Dropout acts on the code of r numbers before V. Biases stay. 8,448 parameters
on ViT-B/16 with form="tt", rank=4; 30,976 with form="tk", rank=16. Merged: each dW_i is added to its slice.

A layer is cut into squares of its narrower side, the last one cut short where the wider side is no multiple of it;
each tap of a kernel is a slice of its own. Where the width changes from stage to stage (Swin, ConvNeXt) the layers
of each width have their own U, V and C, and P of each starts as a matrix r x N of that width's slices.

Deviation from the released code, on purpose: its TK form reshapes the cores of fc1 and fc2 so that a slice gets
columns of several of them; here, as in the paper, each slice gets its own. Layouts: channels last and channels
first, joint and separate projections, and ``nn.MultiheadAttention``'s packed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import Adapter
from refold.adapters.factored import Factored
from refold.methods.base import require
from refold.methods.weight import WeightMethod, share
from refold.sites import Site

__all__ = ["FacT"]


@dataclass(frozen=True)
class FacT(WeightMethod):
    """Change of all weights as one tensor, in factors that the layers share; merges exactly.

    Args:
        rank: r.
        form: ``"tt"`` (tensor train: a core for each slice) or ``"tk"`` (Tucker: cores mixed from r shared ones).
        scale: s; the paper searches {0.01, 0.1, 1, 10, 100} per task.
        dropout: on the code of r numbers, in training only; none where the weight itself is replaced
            (``nn.MultiheadAttention``), which ``explain`` tells.
        sites: roles or module paths (``*`` allowed); None is every projection of attention and MLP where the
            backbone has these, else every Linear and every channel-mixing convolution.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it where adapters must be tiny: ``form="tt"`` with rank 4 stores 8,448 numbers a task for a ViT-B/16. Search the
    scale.
    """

    rank: int = 16
    form: str = "tk"
    scale: float = 1.0
    dropout: float = 0.1
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "all weights' change as one factored tensor"
    paper: ClassVar[str] = "arXiv 2212.03145"
    ungrouped: ClassVar[str] = "its slices mix all channels"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "form", self.form in ("tt", "tk"), '"tt" or "tk"')

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Factored:
        return Factored(
            site.weight_shape,
            self.rank,
            self.form,
            self.scale,
            self.dropout,
            channel_dim=site.channel_dim,
            device=device,
            dtype=dtype,
        )

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        mine = (adapter for adapter in adapters.values() if isinstance(adapter, Factored))
        share(mine, "factors", lambda adapter: adapter.width, Factored.tie)

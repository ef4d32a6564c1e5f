"""Mona: "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks" (arXiv 2408.08345).

    y = x + U drop(GELU(v)) + b,   v = m + Mix m,   m = u + (F3 u + F5 u + F7 u) / 3,   u = D (g LN(x) + f x) + a

x is the stream behind the attention's, and behind the MLP's, residual sum. F3, F5 and F7 are depthwise filters, Mix is
1 x 1; g starts at 1e-6 and f at 1, for each channel, D and U as a normal of std 0.02 with zero biases and the filters
as torch's layers do: the start is noise beside the backbone, as published. A place has 133 d + 9,728 parameters with
hidden=64: 5,267,712 on Swin-L, as the released training log has it (the paper's table prints 5.08M), and 3,667,456 on
Swin-B (printed 4.16M). It does not fold: it has an activation and mixes positions.

Deviations from the released code, on purpose: a class token or registers, which Swin has not, pass the filters alone,
as images of one pixel. Layouts: tokens, (B, H, W, C) and (B, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters.multiscale import MultiScaleBottleneck
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.weight import check_usual
from refold.places import branch_sites, on_grid
from refold.sites import Site
from refold.survey import Survey

__all__ = ["Mona"]


@dataclass(frozen=True)
class Mona(Method):
    """Bottleneck with filters of three sizes and a scaled norm, behind the residual sums of attention and MLP.

    Args:
        hidden: inner width h.
        dropout: before the up projection, in training only.
        sites: roles (``"attention"``, ``"mlp"``) or paths of residual branches; None is both roles.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it for detection and segmentation, where the adapter may stay in the model: with Swin it is printed ahead of
    full fine-tuning there, for little less memory.
    """

    hidden: int = 64
    dropout: float = 0.1
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "bottleneck with filters of three sizes behind the residual sums"
    paper: ClassVar[str] = "arXiv 2408.08345"
    folds: ClassVar[str] = "no"
    tasks: ClassVar[str] = "detection, segmentation, classification"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "hidden", is_count(self.hidden), "a positive integer")

    def plan(self, survey: Survey) -> Plan:
        sites, skipped = branch_sites(survey, self.sites, ("attention", "mlp"), "sum")
        sites, flat = on_grid(survey, sites)
        return Plan(tuple(sites), tuple(skipped + flat))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> MultiScaleBottleneck:
        return MultiScaleBottleneck(site.width, self.hidden, self.dropout, device=device, dtype=dtype)

"""ARC: "Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing" (arXiv 2310.06234).

    f(x) = x + D^T drop(c * D x) + b   before a frozen projection

D (r x d) serves down and up, and every layer: one before the attention, one before the MLP. Each layer has its own
coefficients c (r) and bias b (d). D Xavier-uniform, c and b zero: the identity at the start. Places: RepAdapter's,
before the attention's and the MLP's first projection. 96,432 parameters on ViT-B/16 with r = 50 (the printed 0.13M with
a head of 49 classes, VTAB's mean). Merged: ``W (I + D^T diag(c) D)``, and W b into
the bias.

Where the width changes from stage to stage there is one D for each width. Deviations from the released code, on
purpose: it starts the MLP's coefficients at random, so away from the backbone; and on Swin its second adapter stands
before the norm, on the residual stream, where it does not fold. Layouts: channels last and channels first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import Adapter
from refold.adapters.recomposed import Recomposed
from refold.methods.base import Method, Plan
from refold.methods.weight import check_usual, share
from refold.sites import Site
from refold.survey import Survey

__all__ = ["ARC"]


@dataclass(frozen=True)
class ARC(Method):
    """Symmetric linear bottleneck shared by all layers, re-scaled by each; merges exactly.

    Args:
        rank: r.
        dropout: on the code of r numbers, in training only.
        sites: roles (``"attention"``, ``"mlp"``) or module paths (``*`` allowed); None is both roles where the
            backbone has them, else every Linear and every channel-mixing convolution.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it in place of :class:`RepAdapter` where less than half of its numbers shall do; it merges as exactly.
    """

    rank: int = 50
    dropout: float = 0.1
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "shared linear bottleneck before a projection, re-scaled by each layer"
    paper: ClassVar[str] = "arXiv 2310.06234"

    def __post_init__(self) -> None:
        check_usual(self)

    def plan(self, survey: Survey) -> Plan:
        layers, skipped = survey.resolve(self.sites, ("attention", "mlp"), moved=True)
        return Plan(tuple(survey.input_sites(layers, wants_shift=True)), tuple(skipped))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Recomposed:
        return Recomposed(
            site.width,
            self.rank,
            self.dropout,
            group=site.role,
            channel_dim=site.channel_dim,
            shift=site.has_shift,
            device=device,
            dtype=dtype,
        )

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        mine = (adapter for adapter in adapters.values() if isinstance(adapter, Recomposed))
        share(mine, "shared", lambda adapter: adapter.group, Recomposed.projection)
